/* One rectangle of a JPEG's pixels, bit for bit those of the whole image, for less than the work of decoding it.
 *
 * libjpeg-turbo can leave out the inverse DCT, the upsampling and the colours of what lies beside a rectangle, and it need not read what
 * lies below. Two neighbours of each edge are decoded with it (MARGIN), since chroma is interpolated between samples.
 *
 * crop() is strict: anything that is not an ordinary JPEG, and all that libjpeg warns about, gives False, and the caller decodes the
 * whole image in the ordinary way. So does a file without its end: what lies below the rectangle is not decoded, but the markers in it
 * are read up to EOI, so that a truncated file is never taken for a whole one.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2.0 or later is needed (jpeg_crop_scanline, jpeg_skip_scanlines)"
#endif

enum { MARGIN = 8 }; /* Output pixels: at least two chroma samples to each side, whatever the subsampling. */

struct failure {
    struct jpeg_error_mgr manager; /* first, so that cinfo->err points to both */
    jmp_buf leave;
};

struct rectangle {
    unsigned image_width, image_height; /* what the caller expects of the whole image */
    unsigned reduction;                 /* 1, 2, 4 or 8 */
    unsigned top, left, height, width;  /* in pixels of the reduced image */
};

static void leave(j_common_ptr cinfo) { longjmp(((struct failure *)cinfo->err)->leave, 1); }

static void on_message(j_common_ptr cinfo, int level)
{
    if (level < 0) /* a warning: the data are corrupt */
        leave(cinfo);
}

static void be_silent(j_common_ptr cinfo) { (void)cinfo; }

/* Does entropy-coded data go on up to EOI, with nothing but restart markers in it? */
static int reaches_end(const struct jpeg_decompress_struct *cinfo)
{
    const unsigned char *at = cinfo->src->next_input_byte;
    const unsigned char *end = at + cinfo->src->bytes_in_buffer;
    int marker = cinfo->unread_marker; /* found by the decoder, which is already behind it */
    for (;;) {
        if (marker == JPEG_EOI)
            return 1;
        if (marker != 0 && !(marker >= JPEG_RST0 && marker <= JPEG_RST0 + 7 && cinfo->restart_interval != 0))
            return 0;
        at = at < end ? memchr(at, 0xFF, (size_t)(end - at)) : NULL;
        if (at == NULL)
            return 0;
        while (at < end && *at == 0xFF)
            at++;
        if (at == end)
            return 0;
        marker = *at++; /* 0 is a stuffed byte, no marker */
    }
}

/* 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1 and gray: TurboJPEG, which decodes the whole images, refuses some of the others. */
static int is_usual_sampling(const struct jpeg_decompress_struct *cinfo)
{
    int across = cinfo->comp_info[0].h_samp_factor, down = cinfo->comp_info[0].v_samp_factor;
    if (cinfo->num_components == 1)
        return across == 1 && down == 1;
    return (across <= 2 || (across == 4 && down == 1)) && down <= 2 && cinfo->comp_info[1].h_samp_factor == 1 &&
           cinfo->comp_info[1].v_samp_factor == 1 && cinfo->comp_info[2].h_samp_factor == 1 && cinfo->comp_info[2].v_samp_factor == 1;
}

static int is_ordinary(const struct jpeg_decompress_struct *cinfo, const struct rectangle *wanted)
{
    if (cinfo->image_width != wanted->image_width || cinfo->image_height != wanted->image_height)
        return 0;
    /* One scan with all components: of several, all coefficients have to be read and kept anyway. */
    if (cinfo->progressive_mode || cinfo->data_precision != 8 || cinfo->comps_in_scan != cinfo->num_components)
        return 0;
    switch (cinfo->jpeg_color_space) {
    case JCS_YCbCr:
    case JCS_RGB:
        return cinfo->num_components == 3 && is_usual_sampling(cinfo);
    case JCS_GRAYSCALE:
        return cinfo->num_components == 1 && is_usual_sampling(cinfo);
    default:
        return 0;
    }
}

/* Fill `out`; leaves by longjmp where this is nothing for us. */
static void read_rectangle(struct jpeg_decompress_struct *cinfo, const struct rectangle *wanted, unsigned char *out)
{
    JDIMENSION first, columns, row, skipped;
    JSAMPARRAY line;

    if (jpeg_read_header(cinfo, TRUE) != JPEG_HEADER_OK || !is_ordinary(cinfo, wanted))
        leave((j_common_ptr)cinfo);
    cinfo->out_color_space = JCS_RGB;
    cinfo->dct_method = JDCT_ISLOW;
    cinfo->do_fancy_upsampling = TRUE;
    cinfo->scale_num = 1;
    cinfo->scale_denom = wanted->reduction;
    jpeg_start_decompress(cinfo);
    if (wanted->left + wanted->width > cinfo->output_width || wanted->top + wanted->height > cinfo->output_height)
        leave((j_common_ptr)cinfo);

    first = wanted->left > MARGIN ? wanted->left - MARGIN : 0;
    columns = wanted->left + wanted->width + MARGIN;
    columns = (columns < cinfo->output_width ? columns : cinfo->output_width) - first;
    if (columns < cinfo->output_width)
        jpeg_crop_scanline(cinfo, &first, &columns); /* moves `first` to the left, to whole blocks */
    line = (*cinfo->mem->alloc_sarray)((j_common_ptr)cinfo, JPOOL_IMAGE, cinfo->output_width * 3, 1);

    skipped = wanted->top > MARGIN ? wanted->top - MARGIN : 0;
    if (skipped > 0 && jpeg_skip_scanlines(cinfo, skipped) != skipped)
        leave((j_common_ptr)cinfo);
    for (row = skipped; row < wanted->top + wanted->height; row++) {
        if (jpeg_read_scanlines(cinfo, line, 1) != 1)
            leave((j_common_ptr)cinfo);
        if (row >= wanted->top) {
            memcpy(out, line[0] + (size_t)(wanted->left - first) * 3, (size_t)wanted->width * 3);
            out += (size_t)wanted->width * 3;
        }
    }
    if (!reaches_end(cinfo))
        leave((j_common_ptr)cinfo);
}

/* 1 if `out` holds the rectangle, 0 if this is nothing for us. No Python in here. */
static int decode(const unsigned char *data, size_t size, const struct rectangle *wanted, unsigned char *out)
{
    struct jpeg_decompress_struct cinfo;
    struct failure failure;
    volatile int done = 0;

    memset(&cinfo, 0, sizeof cinfo); /* destroying is then harmless, also before creating */
    cinfo.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = leave;
    failure.manager.emit_message = on_message;
    failure.manager.output_message = be_silent;
    if (setjmp(failure.leave) == 0) {
        jpeg_create_decompress(&cinfo);
        jpeg_mem_src(&cinfo, data, (unsigned long)size);
        read_rectangle(&cinfo, wanted, out);
        done = 1;
    }
    jpeg_destroy_decompress(&cinfo);
    return done;
}

PyDoc_STRVAR(crop_doc, "crop(data, image_height, image_width, reduction, top, left, height, width, out) -> bool\n\n"
                       "Write one rectangle of the reduced image into `out`, uint8 [height, width, 3]; False if this JPEG has to be decoded whole.");

static PyObject *crop(PyObject *self, PyObject *args)
{
    Py_buffer data, out;
    struct rectangle wanted;
    int done = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*IIIIIIIw*", &data, &wanted.image_height, &wanted.image_width, &wanted.reduction, &wanted.top, &wanted.left,
                          &wanted.height, &wanted.width, &out))
        return NULL;
    /* JPEG's sides are below 65,536: sums and products below cannot overflow. */
    if (wanted.height < 1 || wanted.width < 1 || (wanted.top | wanted.left | wanted.height | wanted.width) > 65535 ||
        out.len != (Py_ssize_t)wanted.height * wanted.width * 3 ||
        (wanted.reduction != 1 && wanted.reduction != 2 && wanted.reduction != 4 && wanted.reduction != 8)) {
        PyErr_SetString(PyExc_ValueError, "a rectangle of at least one pixel, a reduction of 1, 2, 4 or 8, and room for exactly its pixels");
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = decode(data.buf, (size_t)data.len, &wanted, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(done);
}

static PyMethodDef methods[] = {{"crop", crop, METH_VARARGS, crop_doc}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg_crop", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_crop(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddIntConstant(made, "LIBJPEG_TURBO", LIBJPEG_TURBO_VERSION_NUMBER) < 0)
        Py_CLEAR(made);
    return made;
}
