// What the parts of the simulated CUDA runtime share: the devices' memory, the streams and who waits for them.
//
// PyTorch calls the CUDA runtime, the driver and NCCL by their C names; these are those names, in host memory. No GPU and no kernels: what PyTorch
// would compute on a device is computed by operators.cpp, on the CPU. All else keeps CUDA's rules, and where the rules leave room, the worst case:
//
//   - device memory cannot be touched by the host (SIGSEGV), and fresh memory holds 0xFF: NaN in every floating type;
//   - work on a stream is done when somebody waits for it, or computes on that stream, and no sooner: a missing wait gives wrong numbers every time;
//   - a copy into pinned memory lands when the *host* waits for it, by a stream, an event or a device: work on the device that follows does not count;
//   - a process forked after the first call of CUDA may call nothing;
//   - collectives wait for ranks that will never come.
//
//   SIMCUDA_DEVICES   number of GPUs (2)              SIMCUDA_MEM_MB   memory of each, for this process (4096)
//   SIMCUDA_CC        compute capability (80)         SIMCUDA_TRACE    1: say what is unusual on stderr
#pragma once
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace sim {
using Clock = std::chrono::steady_clock;
using Guard = std::lock_guard<std::recursive_mutex>;

struct Stream;

struct Allocation {
    char* shadow;  // where the bytes really are; the address that PyTorch knows cannot be touched
    size_t size;
    int device;
    int file;
};

struct Operation {
    std::function<bool()> attempt;  // true: done. False: it waits for something else; try again
    const char* what;
};

// Bytes on their way into pinned memory, from the operation number `number`.
struct Landing {
    uint64_t number;
    char* to;
    std::string bytes;
};

// After its operation `number`, a stream has waited for operation `other_number` of `other`. Who waits for the one has waited for the other.
struct Inherited {
    uint64_t number;
    Stream* other;
    uint64_t other_number;
};

struct Stream {
    int device = 0;
    int priority = 0;
    std::deque<Operation> waiting;
    uint64_t enqueued = 0, done = 0;
    bool busy = false;
    std::deque<Landing> landings;
    std::deque<Inherited> inherited;
};

struct Event {
    Stream* stream = nullptr;  // null: never recorded
    uint64_t number = 0;
    int device = 0;
    std::shared_ptr<Clock::time_point> time = std::make_shared<Clock::time_point>();
};

struct World {
    std::recursive_mutex lock;
    std::map<char*, Allocation> device_memory;  // by first address
    std::map<char*, size_t> pinned;
    std::unordered_map<const void*, std::string> kernels;
    std::map<int, Stream> default_streams;
    std::set<Stream*> streams;
    size_t used[64] = {};
    unsigned long contexts = 0;  // bit d: this process has a context on device d
};

World& world();
extern thread_local int current_device;

long setting(const char* name, long otherwise);
bool trace();
int device_count();
size_t memory_of_a_device();
bool forked();  // since this process's first call of CUDA
cudaError_t fail(cudaError_t error, const char* where);
void make_context(int device);

bool is_pinned(const void* address);

Stream* stream_of(cudaStream_t stream);
void enqueue(Stream* stream, const char* what, std::function<bool()> attempt);
void progress(Stream* stream);                       // do what can be done; the lock is held
void finish(Stream* stream, uint64_t number);        // wait until operation `number` is done, as the stream's next operation does
void host_waits(Stream* stream, uint64_t number);    // and let its copies into host memory land
void host_waits_for_all();
void land_within(const char* from, size_t size);     // copies on their way into this memory
}  // namespace sim

// First in each call: as with the real thing, a forked child may call nothing, and without a device nothing works.
#define BEGIN(where)                                                                            \
    if (sim::forked()) return sim::fail(cudaErrorInitializationError, where " in a forked process"); \
    if (sim::device_count() == 0) return sim::fail(cudaErrorNoDevice, where)

API void* simcuda_shadow(const void* address);
