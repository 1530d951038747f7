// The words that CUDA's headers put before functions and types, as g++ takes them. NVIDIA's own file comes with its compiler, not with PyTorch.
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __align__(n) __attribute__((aligned(n)))
#define __location__(a) __annotate__(a)
#define __annotate__(a) __attribute__((a))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __CUDA_HOSTDEVICE__
