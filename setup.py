"""The one thing that pyproject.toml cannot say: a native extra that is built where a C compiler and libjpeg-turbo's headers are.

Without them the installation goes on, and dtl decodes whole JPEGs. Where libjpeg lies elsewhere, setuptools takes CFLAGS and LDFLAGS.
"""

from setuptools import Extension, setup

setup(ext_modules=[Extension("dtl.data.decoding._jpeg_crop", ["dtl/data/decoding/_jpeg_crop.c"], libraries=["jpeg"], optional=True)])
