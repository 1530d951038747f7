// The devices themselves, errors, kernels (there are none), and the driver as far as PyTorch looks at it.
#include <dlfcn.h>
#include <unistd.h>

#include <cstring>

#include "world.h"

using namespace sim;

static thread_local cudaError_t last_error = cudaSuccess;
thread_local int sim::current_device = 0;

World& sim::world() {
    static World* only = new World;  // never destroyed: threads of PyTorch call until the very end
    return *only;
}

long sim::setting(const char* name, long otherwise) {
    const char* value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

bool sim::trace() {
    static bool on = setting("SIMCUDA_TRACE", 0);
    return on;
}

cudaError_t sim::fail(cudaError_t error, const char* where) {
    last_error = error;
    if (trace()) fprintf(stderr, "simcuda: %s -> error %d\n", where, (int)error);
    return error;
}

bool sim::forked() {
    static pid_t first = 0;
    if (!first) first = getpid();
    return first != getpid();
}

// As many as CUDA_VISIBLE_DEVICES shows of those that there are: numbers, up to the first that is not one of them; or UUIDs.
static std::vector<int> visible_devices() {
    std::vector<int> shown;
    int have = (int)setting("SIMCUDA_DEVICES", 2);
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) {
        for (int device = 0; device < have; device++) shown.push_back(device);
        return shown;
    }
    std::string text(visible);
    for (size_t begin = 0; begin <= text.size();) {
        size_t end = std::min(text.find(',', begin), text.size());
        std::string word = text.substr(begin, end - begin);
        char* rest = nullptr;
        long device = strtol(word.c_str(), &rest, 10);
        if (word.empty() || *rest || device < 0 || device >= have) break;
        shown.push_back((int)device);
        begin = end + 1;
    }
    return shown;
}
static const std::vector<int>& physical() {
    static std::vector<int> devices = visible_devices();
    return devices;
}
int sim::device_count() { return (int)physical().size(); }

void sim::make_context(int device) {
    World& x = world();
    if (x.contexts >> device & 1) return;
    x.contexts |= 1ul << device;
    if (trace()) fprintf(stderr, "simcuda: pid %d makes a context on device %d\n", getpid(), device);
}
API unsigned long simcuda_contexts() { return world().contexts; }

// ---- devices

API cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    if (forked()) return fail(cudaErrorInitializationError, "cudaGetDeviceCount in a forked process");
    *count = device_count();
    return *count ? cudaSuccess : fail(cudaErrorNoDevice, "cudaGetDeviceCount");
}
API cudaError_t cudaGetDevice(int* device) {
    BEGIN("cudaGetDevice");
    *device = current_device;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
    BEGIN("cudaSetDevice");
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice, "cudaSetDevice");
    current_device = device;
    make_context(device);
    return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    BEGIN("cudaGetDeviceProperties");
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice, "cudaGetDeviceProperties");
    memset(p, 0, sizeof *p);
    int number = physical()[device], capability = (int)setting("SIMCUDA_CC", 80);
    snprintf(p->name, sizeof p->name, "Simulated GPU %d", number);
    p->uuid.bytes[0] = (char)(number + 1);
    p->pciBusID = number + 1;
    p->major = capability / 10;
    p->minor = capability % 10;
    p->totalGlobalMem = memory_of_a_device();
    // The rest as an A100 has it.
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 166912;
    p->sharedMemPerMultiprocessor = 167936;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->multiProcessorCount = 108;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = 40 << 20;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->totalConstMem = 65536;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->managedMemory = p->cooperativeLaunch = p->streamPrioritiesSupported = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    auto error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", physical()[device] + 1);
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- errors

static const cudaError_t NO_KERNEL = cudaErrorInvalidDeviceFunction;
API cudaError_t cudaGetLastError() {
    auto error = last_error;
    last_error = cudaSuccess;
    return error;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInitializationError: return "initialization error";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
        case NO_KERNEL: return "simcuda: a kernel that has no stand-in";
        default: return "simulated error";
    }
}
API const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- kernels: none runs; a launch that gets here has no stand-in in operators.cpp, and is an error that names the kernel

API void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) { world().kernels[host] = name; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

static thread_local struct {
    dim3 grid, block;
    size_t memory;
    cudaStream_t stream;
} configuration;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t memory, cudaStream_t stream) {
    configuration = {grid, block, memory, stream};
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* memory, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *memory = configuration.memory;
    *(cudaStream_t*)stream = configuration.stream;
    return cudaSuccess;
}
static cudaError_t no_kernel(const void* kernel) {
    auto name = world().kernels.find(kernel);
    fprintf(stderr, "simcuda: a kernel that has no stand-in: %s\n", name == world().kernels.end() ? "?" : name->second.c_str());
    return fail(NO_KERNEL, "cudaLaunchKernel");
}
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    BEGIN("cudaLaunchKernel");
    return no_kernel(kernel);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    BEGIN("cudaLaunchKernel");
    return no_kernel((void*)kernel);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
    BEGIN("cudaLaunchKernelExC");
    return no_kernel(kernel);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 1;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    *address = nullptr;
    return cudaErrorInvalidValue;
}

// ---- the driver

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (trace()) fprintf(stderr, "simcuda: entry point %s of the driver %s\n", name, *function ? "found" : "missing");
    return cudaSuccess;
}
API int cuInit(unsigned) { return 0; }
API int cuDeviceGet(int* device, int number) {
    *device = number;
    return 0;
}
API int cuDeviceGetAttribute(int* value, int attribute, int device) { return cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device); }
API int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = (void*)1;
    return 0;
}
API int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    *flags = 0;
    *active = (world().contexts >> device) & 1;
    return 0;
}
API int cuCtxGetCurrent(void** context) { return cuDevicePrimaryCtxRetain(context, 0); }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuGetErrorName(int, const char** text) {
    *text = "simulated error";
    return 0;
}
API int cuGetErrorString(int, const char** text) { return cuGetErrorName(0, text); }
