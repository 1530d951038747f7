// Device memory, pinned host memory, and what a pointer points to.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "world.h"

using namespace sim;

namespace {
const size_t PAGE = 4096;

size_t whole_pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

// The entry of `entries` (by first address) whose memory holds `address`.
template <class Entries, class SizeOf>
auto holding(Entries& entries, const void* address, SizeOf size_of) {
    auto after = entries.upper_bound((char*)address);
    if (after == entries.begin()) return entries.end();
    auto entry = std::prev(after);
    return (size_t)((char*)address - entry->first) < size_of(entry->second) ? entry : entries.end();
}

auto device_memory_at(const void* address) {
    return holding(world().device_memory, address, [](const Allocation& allocation) { return allocation.size; });
}
}  // namespace

bool sim::is_pinned(const void* address) {
    return holding(world().pinned, address, [](size_t size) { return size; }) != world().pinned.end();
}

size_t sim::memory_of_a_device() { return (size_t)setting("SIMCUDA_MEM_MB", 4096) << 20; }

// Where the bytes of device memory really are; null for host memory.
API void* simcuda_shadow(const void* address) {
    Guard guard(world().lock);
    auto entry = device_memory_at(address);
    return entry == world().device_memory.end() ? nullptr : entry->second.shadow + ((char*)address - entry->first);
}

API cudaError_t cudaMalloc(void** out, size_t size) {
    BEGIN("cudaMalloc");
    Guard guard(world().lock);
    make_context(current_device);
    size_t rounded = whole_pages(size);
    if (world().used[current_device] + rounded > memory_of_a_device()) return fail(cudaErrorMemoryAllocation, "cudaMalloc");
    int file = memfd_create("simcuda", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, rounded)) return fail(cudaErrorMemoryAllocation, "memfd_create");
    char* address = (char*)mmap(nullptr, rounded, PROT_NONE, MAP_SHARED, file, 0);
    char* shadow = (char*)mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (address == MAP_FAILED || shadow == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "mmap");
    memset(shadow, 0xFF, rounded);
    world().device_memory[address] = {shadow, rounded, current_device, file};
    world().used[current_device] += rounded;
    *out = address;
    return cudaSuccess;
}

API cudaError_t cudaFree(void* address) {
    BEGIN("cudaFree");
    if (!address) return cudaSuccess;
    Guard guard(world().lock);
    auto entry = world().device_memory.find((char*)address);
    if (entry == world().device_memory.end()) return fail(cudaErrorInvalidValue, "cudaFree");
    host_waits_for_all();
    Allocation& allocation = entry->second;
    munmap(entry->first, allocation.size);
    munmap(allocation.shadow, allocation.size);
    close(allocation.file);
    world().used[allocation.device] -= allocation.size;
    world().device_memory.erase(entry);
    return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) {
    BEGIN("cudaHostAlloc");
    Guard guard(world().lock);
    make_context(current_device);
    size_t rounded = whole_pages(size);
    char* address = (char*)mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "cudaHostAlloc");
    madvise(address, rounded, MADV_DONTFORK);  // as the driver does: forked children do not have it
    world().pinned[address] = rounded;
    *out = address;
    return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* address) {
    BEGIN("cudaFreeHost");
    Guard guard(world().lock);
    auto entry = world().pinned.find((char*)address);
    if (entry == world().pinned.end()) return fail(cudaErrorInvalidValue, "cudaFreeHost");
    host_waits_for_all();
    munmap(entry->first, entry->second);
    world().pinned.erase(entry);
    return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
    BEGIN("cudaHostRegister");
    Guard guard(world().lock);
    char* page = (char*)((uintptr_t)address & ~(PAGE - 1));
    madvise(page, whole_pages(size + ((char*)address - page)), MADV_DONTFORK);
    world().pinned[(char*)address] = size;
    return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* address) {
    Guard guard(world().lock);
    host_waits_for_all();
    world().pinned.erase((char*)address);
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
    BEGIN("cudaPointerGetAttributes");
    Guard guard(world().lock);
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    found->device = -2;
    auto entry = device_memory_at(address);
    if (entry != world().device_memory.end()) {
        found->type = cudaMemoryTypeDevice;
        found->device = entry->second.device;
        found->devicePointer = (void*)address;
    } else if (is_pinned(address)) {
        found->type = cudaMemoryTypeHost;
        found->device = 0;
        found->hostPointer = found->devicePointer = (void*)address;
    }
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    BEGIN("cudaMemGetInfo");
    Guard guard(world().lock);
    make_context(current_device);
    *total = memory_of_a_device();
    *free_bytes = *total - world().used[current_device];
    return cudaSuccess;
}
