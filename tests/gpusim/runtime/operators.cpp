// Computes on the CPU whatever PyTorch would launch on a CUDA device: every operator with a kernel for CUDA gets a stand-in, which looks at the
// same memory as CPU tensors and calls the CPU's kernel. Allocation, views, streams, events and copies between host and device stay PyTorch's own.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Copy.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

extern "C" void* simcuda_shadow(const void*);
extern "C" void simcuda_drain(void*);
namespace at::native {
Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking);
}

namespace {
using at::Tensor;
using c10::IValue;
using OptionalTensor = std::optional<Tensor>;

std::atomic<uint64_t> calls{0};

// ---- one piece of memory, seen as a tensor of the CPU and of the device

Tensor seen_by_host(const Tensor& tensor) {
    void* memory = tensor.numel() ? simcuda_shadow(tensor.const_data_ptr()) : nullptr;
    return at::from_blob(memory, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
}

size_t bytes_spanned(const Tensor& tensor) {
    if (!tensor.numel()) return 0;
    size_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); i++) last += (tensor.size(i) - 1) * tensor.stride(i);
    return (last + 1) * tensor.element_size();
}

Tensor moved_to(const Tensor& found, c10::Device device) {
    if (!found.defined() || !found.device().is_cpu()) return found;
    Tensor dense = found.is_non_overlapping_and_dense() ? found : found.contiguous();
    Tensor made = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(device).pinned_memory(false));
    if (size_t size = bytes_spanned(dense)) std::memcpy(simcuda_shadow(made.const_data_ptr()), dense.const_data_ptr(), size);
    return made;
}

void wait_for_stream_of(c10::Device device) { simcuda_drain(c10::cuda::getCurrentCUDAStream(device.index()).stream()); }

// ---- the stand-in

// The tensors of one call, as the CPU's kernel sees them.
class Loans {
  public:
    Loans(const c10::FunctionSchema& schema, c10::Device device) : schema_(schema), device_(device) {}

    Tensor lend(const Tensor& tensor, bool may_be_resized) {
        if (!tensor.defined()) return tensor;
        if (!tensor.is_cuda()) {
            static const std::set<std::string> take_host_tensors = {"aten::index", "aten::_index_put_impl_", "aten::_foreach_copy_"};
            check(tensor.dim() == 0 || take_host_tensors.count(schema_.name()), tensor);
            return tensor;
        }
        check(tensor.device() == device_, tensor);
        for (const auto& loan : loans_)
            if (loan.own.is_same(tensor)) return loan.lent;
        Tensor lent = seen_by_host(tensor);
        if (may_be_resized) lent = lent.clone(at::MemoryFormat::Preserve);  // the kernel may want other memory for its result
        loans_.push_back({tensor, lent, may_be_resized});
        return lent;
    }

    void take_back_resized() {
        for (auto& loan : loans_) {
            if (!loan.may_be_resized) continue;
            if (loan.own.sizes() != loan.lent.sizes()) loan.own.resize_(loan.lent.sizes());
            seen_by_host(loan.own).copy_(loan.lent);
        }
    }

    Tensor returned(const Tensor& tensor) const {
        for (const auto& loan : loans_)
            if (loan.lent.is_same(tensor)) return loan.own;
        return moved_to(tensor, device_);
    }

  private:
    void check(bool allowed, const Tensor& tensor) const {
        TORCH_CHECK(allowed, "Expected all tensors to be on the same device, but found at least two devices, ", device_, " and ", tensor.device(), " in ",
                    schema_.operator_name().name);
    }

    struct Loan {
        Tensor own, lent;
        bool may_be_resized;
    };
    const c10::FunctionSchema& schema_;
    c10::Device device_;
    std::vector<Loan> loans_;
};

// `value` with `change` applied to each tensor in it.
template <class Change>
IValue with_tensors(const IValue& value, Change change) {
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<Tensor> changed;
        for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
        return changed;
    }
    if (value.isOptionalTensorList()) {
        c10::List<OptionalTensor> changed;
        for (const OptionalTensor& tensor : value.toOptionalTensorVector()) changed.push_back(tensor ? OptionalTensor(change(*tensor)) : std::nullopt);
        return changed;
    }
    return value;
}

c10::Device device_of_call(torch::jit::Stack::iterator begin, torch::jit::Stack::iterator end) {
    std::optional<c10::Device> device;
    for (auto value = begin; value != end; value++) {
        with_tensors(*value, [&](const Tensor& tensor) {
            if (!device && tensor.defined() && tensor.is_cuda()) device = tensor.device();
            return tensor;
        });
        if (value->isDevice() && value->toDevice().is_cuda()) device = value->toDevice();
    }
    return device && device->has_index() ? *device : c10::Device(at::kCUDA, c10::cuda::current_device());
}

// The size of such a result depends on values, so that the host waits for them.
bool makes_the_host_wait(const c10::FunctionSchema& schema, torch::jit::Stack::iterator begin, torch::jit::Stack::iterator end) {
    static const std::set<std::string> by_value = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};
    if (by_value.count(schema.name())) return true;
    bool by_mask = false;  // an index that is a mask: its kernel calls nonzero
    if (schema.name() == "aten::index" || schema.name() == "aten::_index_put_impl_")
        for (auto value = begin; value != end; value++)
            if (value->isOptionalTensorList())
                with_tensors(*value, [&](const Tensor& tensor) {
                    by_mask = by_mask || (tensor.defined() && tensor.is_cuda() && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte));
                    return tensor;
                });
    return by_mask;
}

void stand_in(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    calls++;
    at::AutoDispatchBelowADInplaceOrView below;
    const auto& schema = op.schema();
    const auto& arguments = schema.arguments();
    const size_t begin = stack->size() - arguments.size();
    c10::Device device = device_of_call(stack->begin() + begin, stack->end());
    c10::DeviceGuard on(device);
    wait_for_stream_of(device);
    if (makes_the_host_wait(schema, stack->begin() + begin, stack->end())) c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream(device.index()).stream());

    Loans loans(schema, device);
    for (size_t i = 0; i < arguments.size(); i++) {
        IValue& value = (*stack)[begin + i];
        const auto* alias = arguments[i].alias_info();
        bool is_out = alias && alias->isWrite() && arguments[i].kwarg_only();
        if (value.isDevice()) value = c10::Device(at::kCPU);
        else if (value.isGenerator() && value.toGenerator().device().is_cuda()) value = IValue();
        else value = with_tensors(value, [&](const Tensor& tensor) { return loans.lend(tensor, is_out); });
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    loans.take_back_resized();
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
        (*stack)[i] = with_tensors((*stack)[i], [&](const Tensor& tensor) { return loans.returned(tensor); });
}

// From device to device; all other copies are PyTorch's own, and so calls of the runtime.
Tensor& copy(Tensor& self, const Tensor& from, bool non_blocking) {
    if (!(self.is_cuda() && from.is_cuda())) return at::native::copy_(self, from, non_blocking);
    calls++;
    at::AutoDispatchBelowADInplaceOrView below;
    for (auto device : {from.device(), self.device()}) {
        c10::DeviceGuard on(device);
        wait_for_stream_of(device);
    }
    seen_by_host(self).copy_(seen_by_host(from));
    return self;
}

// Which kernel of attention: the plain one, made of other operators.
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, std::optional<double>, bool) { return 0; }

bool stays_as_it_is(const c10::FunctionSchema& schema) {
    static const std::set<std::string> own = {"aten::record_stream", "aten::_efficientzerotensor", "aten::set_", "aten::resize_", "aten::empty",
                                              "aten::empty_strided", "aten::_fused_sdp_choice", "aten::copy_", "aten::is_pinned", "aten::_pin_memory",
                                              "aten::resize_as_sparse_", "aten::_local_scalar_dense"};
    if (own.count(schema.name()) || schema.name().rfind("aten::", 0) != 0) return true;
    for (const auto& result : schema.returns())
        if (result.alias_info() && !result.alias_info()->isWrite()) return true;  // views
    return false;
}
}  // namespace

extern "C" uint64_t simops_calls() { return calls; }

extern "C" int simops_install() {
    auto& dispatcher = c10::Dispatcher::singleton();
    auto* handles = new std::vector<c10::RegistrationHandleRAII>;  // for as long as the process lives
    auto names = dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CUDA);
    for (const char* more : {"aten::convolution", "aten::convolution_backward"}) names.push_back({more, ""});
    class : public c10::WarningHandler {
        void process(const c10::Warning&) override {}
    } silent;  // that kernels are replaced is the purpose
    c10::WarningUtils::WarningHandlerGuard guard(&silent);
    int count = 0;
    for (const auto& name : names) {
        auto op = dispatcher.findSchema(name);
        if (!op || stays_as_it_is(op->schema())) continue;
        auto kernel = c10::KernelFunction::makeFromBoxedFunction<&stand_in>();
        handles->push_back(dispatcher.registerImpl(name, c10::DispatchKey::CUDA, kernel, std::nullopt, nullptr, "gpusim"));
        count++;
    }
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    library.impl("copy_", TORCH_FN(copy));
    library.impl("_fused_sdp_choice", TORCH_FN(plain_attention));
    return count;
}
