// NCCL between processes of this machine, through shared memory. As with NCCL a rank that has ended leaves the others waiting.
#include <fcntl.h>
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "world.h"

using namespace sim;

namespace {
const int MOST_RANKS = 64;
const size_t BOX = 1ul << 30;  // what one rank may give to one collective; a sparse file

struct Board {
    std::atomic<int> joined;
    std::atomic<uint64_t> posted[MOST_RANKS], taken[MOST_RANKS];  // the last collective of each rank: its own part is there; it has read the others'
};

struct Communicator {
    int rank, size, device;
    Board* board;
    std::vector<char*> boxes;  // of each rank
    uint64_t calls = 0;
    std::atomic<bool> aborted{false};
};
Communicator* of(ncclComm_t comm) { return (Communicator*)comm; }

std::string path(const char* id, int rank) { return std::string("/dev/shm/") + id + "-" + std::to_string(rank); }
const int BOARD = -1;

void* shared_memory(const std::string& file, size_t size) {
    int opened = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (opened < 0 || ftruncate(opened, size)) return nullptr;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, opened, 0);
    close(opened);
    return memory == MAP_FAILED ? nullptr : memory;
}
}  // namespace

// ---- communicators

API ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
API const char* ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : result == ncclInProgress ? "in progress" : "simulated NCCL error";
}
API const char* ncclGetLastError(ncclComm_t) { return ""; }

API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof *id);
    unsigned long random = 0;
    int source = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (source < 0 || read(source, &random, sizeof random) != sizeof random) return ncclSystemError;
    close(source);
    snprintf(id->internal, sizeof id->internal, "simnccl-%lx", random);
    return ncclSuccess;
}

API ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
    if (size > MOST_RANKS) return ncclInvalidArgument;
    auto* comm = new Communicator;
    comm->rank = rank;
    comm->size = size;
    comm->device = current_device;
    make_context(current_device);
    comm->board = (Board*)shared_memory(path(id.internal, BOARD), sizeof(Board));
    for (int r = 0; r < size; r++) comm->boxes.push_back((char*)shared_memory(path(id.internal, r), BOX));
    for (char* box : comm->boxes)
        if (!box || !comm->board) return ncclSystemError;
    comm->board->joined++;
    while (comm->board->joined < size && !comm->aborted) usleep(200);
    // All have them open: nothing stays in /dev/shm, however the processes end.
    unlink(path(id.internal, rank).c_str());
    if (rank == 0) unlink(path(id.internal, BOARD).c_str());
    if (trace()) fprintf(stderr, "simcuda: pid %d is rank %d of %d in %s, on device %d\n", getpid(), rank, size, id.internal, current_device);
    *out = (ncclComm_t)comm;
    return ncclSuccess;
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank, ncclConfig_t*) { return ncclCommInitRank(out, size, id, rank); }
API ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
    return ncclCommInitRank(out, size, ids[0], rank);
}
API ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (trace()) fprintf(stderr, "simcuda: pid %d aborts its communicator\n", getpid());
    of(comm)->aborted = true;
    return ncclSuccess;
}
API ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    of(comm)->aborted = true;
    return ncclSuccess;
}
API ncclResult_t ncclCommRevoke(ncclComm_t comm, int) { return ncclCommDestroy(comm); }
API ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
API ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* result) {
    *result = ncclSuccess;  // NCCL does not notice a peer on the same machine that was killed either
    return ncclSuccess;
}
API ncclResult_t ncclCommCount(const ncclComm_t comm, int* size) {
    *size = of(comm)->size;
    return ncclSuccess;
}
API ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    *rank = of(comm)->rank;
    return ncclSuccess;
}
API ncclResult_t ncclGroupStart() { return ncclSuccess; }
API ncclResult_t ncclGroupEnd() { return ncclSuccess; }

// ---- sums

namespace {
size_t width(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
        default: return 4;
    }
}

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    BFloat16(float value) {
        uint32_t wide;
        memcpy(&wide, &value, sizeof wide);
        bool nan = (wide & 0x7fffffff) > 0x7f800000;
        bits = nan ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to the nearest, ties to even
    }
};

// `parts` hold n values of Type each; they are combined in the order of ranks, in type Sum.
template <class Type, class Sum>
void combine(const std::vector<char*>& parts, char* out, size_t n, ncclRedOp_t operation) {
    for (size_t i = 0; i < n; i++) {
        Sum sum = (Sum)((Type*)parts[0])[i];
        for (size_t r = 1; r < parts.size(); r++) {
            Sum value = (Sum)((Type*)parts[r])[i];
            switch (operation) {
                case ncclProd: sum = sum * value; break;
                case ncclMax: sum = value > sum ? value : sum; break;
                case ncclMin: sum = value < sum ? value : sum; break;
                default: sum = sum + value;
            }
        }
        if (operation == ncclAvg) sum = sum / (Sum)parts.size();
        ((Type*)out)[i] = (Type)sum;
    }
}

void combine(const std::vector<char*>& parts, char* out, size_t n, ncclDataType_t type, ncclRedOp_t operation) {
    switch (type) {
        case ncclFloat32: return combine<float, float>(parts, out, n, operation);
        case ncclFloat64: return combine<double, double>(parts, out, n, operation);
        case ncclFloat16: return combine<_Float16, float>(parts, out, n, operation);
        case ncclBfloat16: return combine<BFloat16, float>(parts, out, n, operation);
        case ncclInt32: return combine<int32_t, int32_t>(parts, out, n, operation);
        case ncclUint32: return combine<uint32_t, uint32_t>(parts, out, n, operation);
        case ncclInt64: return combine<int64_t, int64_t>(parts, out, n, operation);
        case ncclUint64: return combine<uint64_t, uint64_t>(parts, out, n, operation);
        case ncclInt8: return combine<int8_t, int8_t>(parts, out, n, operation);
        case ncclUint8: return combine<uint8_t, uint8_t>(parts, out, n, operation);
        default: fprintf(stderr, "simcuda: no sum of NCCL type %d\n", (int)type);
    }
}

// ---- collectives: `size` bytes of `send` go into this rank's box; when all ranks' are there, `receive` reads the boxes

ncclResult_t collective(Communicator* comm, const char* what, const void* send, size_t size, cudaStream_t on, std::function<void(std::vector<char*>&)> receive) {
    if (forked()) {
        fprintf(stderr, "simcuda: NCCL in a forked process\n");
        return ncclUnhandledCudaError;
    }
    Guard guard(world().lock);
    char* source = (char*)simcuda_shadow(send);
    Stream* stream = stream_of(on);
    if (size > BOX || (size && !source)) {
        fprintf(stderr, "simcuda: %s of %s\n", what, source ? "more than 1 GiB" : "host memory");
        return ncclInvalidArgument;
    }
    if (stream->device != comm->device) {
        fprintf(stderr, "simcuda: %s on a stream of device %d, its communicator is on %d\n", what, stream->device, comm->device);
        return ncclInvalidUsage;
    }
    uint64_t call = ++comm->calls;
    auto posted = std::make_shared<bool>(false);
    enqueue(stream, what, [=] {
        auto all_have = [&](std::atomic<uint64_t>* marks, uint64_t least) {
            for (int r = 0; r < comm->size; r++)
                if (marks[r] < least) return false;
            return true;
        };
        if (comm->aborted) return true;
        if (!*posted) {
            if (!all_have(comm->board->taken, call - 1)) return false;
            if (size) memcpy(comm->boxes[comm->rank], source, size);
            comm->board->posted[comm->rank] = call;
            *posted = true;
        }
        if (!all_have(comm->board->posted, call)) return false;
        receive(comm->boxes);
        comm->board->taken[comm->rank] = call;
        return true;
    });
    progress(stream);
    return ncclSuccess;
}
}  // namespace

API ncclResult_t ncclAllReduce(const void* send, void* recv, size_t n, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
    char* out = (char*)simcuda_shadow(recv);
    return collective(of(comm), "an all-reduce", send, n * width(type), stream, [=](auto& boxes) { combine(boxes, out, n, type, operation); });
}
API ncclResult_t ncclReduce(const void* send, void* recv, size_t n, ncclDataType_t type, ncclRedOp_t operation, int root, ncclComm_t comm, cudaStream_t stream) {
    char* out = (char*)simcuda_shadow(recv);
    bool receives = of(comm)->rank == root;
    return collective(of(comm), "a reduce", send, n * width(type), stream, [=](auto& boxes) {
        if (receives) combine(boxes, out, n, type, operation);
    });
}
API ncclResult_t ncclBroadcast(const void* send, void* recv, size_t n, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    char* out = (char*)simcuda_shadow(recv);
    size_t size = n * width(type);
    bool sends = of(comm)->rank == root;
    return collective(of(comm), "a broadcast", sends ? send : recv, sends ? size : 0, stream, [=](auto& boxes) { memcpy(out, boxes[root], size); });
}
API ncclResult_t ncclBcast(void* buffer, size_t n, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(buffer, buffer, n, type, root, comm, stream);
}
API ncclResult_t ncclAllGather(const void* send, void* recv, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    char* out = (char*)simcuda_shadow(recv);
    size_t size = n * width(type);
    return collective(of(comm), "an all-gather", send, size, stream, [=](auto& boxes) {
        for (size_t r = 0; r < boxes.size(); r++) memcpy(out + r * size, boxes[r], size);
    });
}
API ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t n, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
    char* out = (char*)simcuda_shadow(recv);
    size_t size = n * width(type);
    int rank = of(comm)->rank;
    return collective(of(comm), "a reduce-scatter", send, size * of(comm)->size, stream, [=](auto& boxes) {
        std::vector<char*> parts;
        for (char* box : boxes) parts.push_back(box + rank * size);
        combine(parts, out, n, type, operation);
    });
}
