#pragma once  // what CUDA's own checks here is which compiler compiles kernels: there are none
