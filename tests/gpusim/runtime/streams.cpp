// Streams, events, and copies: what is queued, when it is done, and when the host may see it.
#include <sched.h>
#include <unistd.h>

#include <cstring>

#include "world.h"

using namespace sim;

// ---- the queue of a stream

Stream* sim::stream_of(cudaStream_t stream) {
    if (stream != nullptr && stream != cudaStreamLegacy && stream != cudaStreamPerThread) return (Stream*)stream;
    Guard guard(world().lock);
    Stream& of_device = world().default_streams[current_device];
    of_device.device = current_device;
    return &of_device;
}

void sim::enqueue(Stream* stream, const char* what, std::function<bool()> attempt) {
    stream->waiting.push_back({std::move(attempt), what});
    stream->enqueued++;
}

void sim::progress(Stream* stream) {
    if (stream->busy) return;
    stream->busy = true;
    while (!stream->waiting.empty() && stream->waiting.front().attempt()) {
        stream->waiting.pop_front();
        stream->done++;
    }
    stream->busy = false;
}

void sim::finish(Stream* stream, uint64_t number) {
    auto since = Clock::now();
    bool told = false;
    for (int turn = 0;; turn++) {
        {
            Guard guard(world().lock);
            progress(stream);
            if (stream->done >= number) return;
            if (trace() && !told && Clock::now() - since > std::chrono::seconds(5)) {
                told = true;
                fprintf(stderr, "simcuda: pid %d has waited 5 s for %s\n", getpid(), stream->waiting.front().what);
            }
        }
        turn < 200 ? sched_yield() : usleep(turn < 2000 ? 50 : 1000);
    }
}

// ---- copies into pinned memory land when the host waits

static void land(Stream* stream, uint64_t number) {
    while (!stream->landings.empty() && stream->landings.front().number <= number) {
        Landing& landing = stream->landings.front();
        memcpy(landing.to, landing.bytes.data(), landing.bytes.size());
        stream->landings.pop_front();
    }
    while (!stream->inherited.empty() && stream->inherited.front().number <= number) {
        Inherited inherited = stream->inherited.front();
        stream->inherited.pop_front();
        land(inherited.other, inherited.other_number);
    }
}

static std::vector<Stream*> all_streams(int device = -1) {
    std::vector<Stream*> all;
    for (auto& entry : world().default_streams)
        if (device < 0 || entry.first == device) all.push_back(&entry.second);
    for (Stream* stream : world().streams)
        if (device < 0 || stream->device == device) all.push_back(stream);
    return all;
}

void sim::land_within(const char* from, size_t size) {
    for (Stream* stream : all_streams())
        for (Landing& landing : stream->landings)
            if (landing.to < from + size && from < landing.to + landing.bytes.size()) memcpy(landing.to, landing.bytes.data(), landing.bytes.size());
}

static void host_sees(Stream* stream, uint64_t number) {
    Guard guard(world().lock);
    land(stream, number);
}

static thread_local uint64_t waits_of_this_thread = 0;
API uint64_t simcuda_waits() { return waits_of_this_thread; }

// Also where there is nothing left to wait for: on a GPU there would have been.
void sim::host_waits(Stream* stream, uint64_t number) {
    waits_of_this_thread++;
    finish(stream, number);
    host_sees(stream, number);
}

// What can be done at once: a collective whose other ranks are not there would hold everything up, and freeing memory must not.
void sim::host_waits_for_all() {
    for (Stream* stream : all_streams()) {
        progress(stream);
        land(stream, stream->done);
    }
}

// Before an operator computes on a stream (operators.cpp).
API void simcuda_drain(void* stream) {
    Stream* own = stream_of((cudaStream_t)stream);
    finish(own, own->enqueued);
}

// ---- streams

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
    BEGIN("cudaStreamCreate");
    Guard guard(world().lock);
    make_context(current_device);
    auto* stream = new Stream;
    stream->device = current_device;
    stream->priority = priority;
    world().streams.insert(stream);
    *out = (cudaStream_t)stream;
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    BEGIN("cudaStreamSynchronize");
    Stream* own = stream_of(stream);
    host_waits(own, own->enqueued);
    return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    BEGIN("cudaStreamQuery");
    Guard guard(world().lock);
    Stream* own = stream_of(stream);
    progress(own);
    if (!own->waiting.empty()) return cudaErrorNotReady;
    host_sees(own, own->enqueued);
    return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
    BEGIN("cudaDeviceSynchronize");
    make_context(current_device);
    stream_of(nullptr);
    std::vector<Stream*> all;
    {
        Guard guard(world().lock);
        all = all_streams(current_device);
    }
    for (Stream* stream : all) host_waits(stream, stream->enqueued);
    return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

// Nothing here is ever captured into a graph.
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* num_nodes) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (num_nodes) *num_nodes = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// ---- events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
    BEGIN("cudaEventCreate");
    make_context(current_device);
    auto* event = new Event;
    event->device = current_device;
    *out = (cudaEvent_t)event;
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    BEGIN("cudaEventDestroy");
    delete (Event*)event;
    return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned) {
    BEGIN("cudaEventRecord");
    Guard guard(world().lock);
    auto* event = (Event*)handle;
    Stream* stream = stream_of(on);
    if (stream->device != event->device) return fail(cudaErrorInvalidResourceHandle, "cudaEventRecord: event and stream are of two devices");
    auto time = std::make_shared<Clock::time_point>();
    enqueue(stream, "an event", [time] {
        *time = Clock::now();
        return true;
    });
    event->stream = stream;
    event->number = stream->enqueued;
    event->time = time;
    if (stream->waiting.size() == 1) progress(stream);  // nothing was queued before it: it has happened
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    BEGIN("cudaEventSynchronize");
    auto* event = (Event*)handle;
    if (event->stream) host_waits(event->stream, event->number);
    return cudaSuccess;
}

API cudaError_t cudaEventQuery(cudaEvent_t handle) {
    BEGIN("cudaEventQuery");
    Guard guard(world().lock);
    auto* event = (Event*)handle;
    if (!event->stream) return cudaSuccess;
    progress(event->stream);
    if (event->stream->done < event->number) return cudaErrorNotReady;
    host_sees(event->stream, event->number);
    return cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    auto *first = (Event*)from, *second = (Event*)to;
    if (!first->stream || !second->stream) return fail(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime");
    *milliseconds = std::chrono::duration<float, std::milli>(*second->time - *first->time).count();
    return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t waits, cudaEvent_t handle, unsigned) {
    BEGIN("cudaStreamWaitEvent");
    Guard guard(world().lock);
    auto* event = (Event*)handle;
    Stream *stream = stream_of(waits), *other = event->stream;
    if (!other || other == stream) return cudaSuccess;
    uint64_t number = event->number;
    enqueue(stream, "another stream's event", [stream, other, number] {
        if (other->done < number) progress(other);
        if (other->done < number) return false;
        if (!other->landings.empty() || !other->inherited.empty()) stream->inherited.push_back({stream->done + 1, other, number});
        return true;
    });
    return cudaSuccess;
}

// ---- functions of the host in a stream: they see what was copied before them

static cudaError_t call_in_stream(cudaStream_t on, const char* what, std::function<void()> function) {
    Guard guard(world().lock);
    Stream* stream = stream_of(on);
    enqueue(stream, what, [stream, function] {
        land(stream, stream->done);
        function();
        return true;
    });
    progress(stream);
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    BEGIN("cudaLaunchHostFunc");
    return call_in_stream(stream, "a host function", [=] { function(data); });
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
    BEGIN("cudaStreamAddCallback");
    return call_in_stream(stream, "a callback", [=] { function(stream, cudaSuccess, data); });
}

// ---- copies

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t on) {
    BEGIN("cudaMemcpyAsync");
    if (!size) return cudaSuccess;
    std::unique_lock<std::recursive_mutex> guard(world().lock);
    make_context(current_device);
    char *target = (char*)simcuda_shadow(to), *source = (char*)simcuda_shadow(from);
    Stream* stream = stream_of(on);
    if (!target && !is_pinned(to)) {  // into pageable memory: the host waits
        guard.unlock();
        host_waits(stream, stream->enqueued);
        memcpy(to, source ? source : from, size);
        return cudaSuccess;
    }
    if (!source && !is_pinned(from)) {  // out of pageable memory: what it holds now
        auto staged = std::make_shared<std::string>((const char*)from, size);
        enqueue(stream, "a copy from pageable memory", [=] {
            memcpy(target ? target : to, staged->data(), size);
            return true;
        });
        return cudaSuccess;
    }
    if (target) {
        enqueue(stream, "a copy", [=] {
            if (!source) land_within((const char*)from, size);
            memmove(target, source ? source : from, size);
            return true;
        });
        return cudaSuccess;
    }
    progress(stream);       // what is queued may read this memory before it is overwritten,
    memset(to, 0xFF, size);  // and what it holds from now until the host has waited is anything
    enqueue(stream, "a copy to pinned memory", [=] {
        stream->landings.push_back({stream->done + 1, (char*)to, std::string(source ? source : (const char*)from, size)});
        return true;
    });
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    auto error = cudaMemcpyAsync(to, from, size, kind, nullptr);
    return error ? error : cudaStreamSynchronize(nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}

API cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t on) {
    BEGIN("cudaMemsetAsync");
    Guard guard(world().lock);
    void* shadow = simcuda_shadow(address);
    void* target = shadow ? shadow : address;
    enqueue(stream_of(on), "a memset", [=] {
        memset(target, value, size);
        return true;
    });
    return cudaSuccess;
}
API cudaError_t cudaMemset(void* address, int value, size_t size) {
    auto error = cudaMemsetAsync(address, value, size, nullptr);
    return error ? error : cudaStreamSynchronize(nullptr);
}
