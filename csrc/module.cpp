// llava_fast._cuda: kernels behind integer pointers and a stream, so that no PyTorch ABI can break them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "patch_embed.h"
#include "resize.h"
#include "rms_norm.h"

namespace py = pybind11;
using namespace llava_fast;

namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(status)) + ": " +
                                 cudaGetErrorString(status));
    }
}

// The number of devices, 0 where there is no GPU or no driver for this runtime.
int device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();  // taken note of; it must not surface in a later call
        return 0;
    }
    check(status);
    return count;
}

// CUDA versions of the runtime in this file and of the driver (0: none), as 1000 * major + 10 * minor. Unlike
// cudaGetDeviceCount this does not initialise CUDA, so a process that has asked may still fork.
std::pair<int, int> versions() {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    return {runtime, driver};
}

std::vector<int> compiled_architectures() { return {LLAVA_FAST_ARCHITECTURES}; }

// Two Python functions for each kernel, which take what `make` takes: one checks and launches, one checks and tells.
template <typename Arguments, typename... Args>
auto launching(Arguments (*make)(Args...), cudaError_t (*launch)(const Arguments&, cudaStream_t)) {
    return [=](Args... args, std::uintptr_t stream) {
        check(launch(make(args...), reinterpret_cast<cudaStream_t>(stream)));
    };
}

template <typename Arguments, typename... Args>
auto planning(Arguments (*make)(Args...), py::dict (*plan)(const Arguments&)) {
    return [=](Args... args) { return plan(make(args...)); };
}

RmsNormArguments rms_norm_arguments(std::uintptr_t output, std::uintptr_t input, std::uintptr_t weight,
                                    std::int64_t rows, std::int64_t columns, std::int64_t output_stride,
                                    std::int64_t input_stride, double eps, DType dtype, std::uintptr_t residual,
                                    std::int64_t residual_stride, std::uintptr_t residual_output,
                                    std::int64_t residual_output_stride) {
    return {output,        input,        weight,          residual,               residual_output, rows, columns,
            output_stride, input_stride, residual_stride, residual_output_stride, eps,             dtype};
}

py::dict rms_norm_plan(const RmsNormArguments& arguments) {
    const RmsNormPlan plan = plan_rms_norm(arguments);
    py::dict report;
    report["vector_elements"] = plan.vector_elements;
    report["threads"] = plan.threads;
    report["blocks"] = plan.blocks;
    return report;
}

PatchEmbedArguments patch_embed_arguments(std::uintptr_t output, std::uintptr_t pixels, std::uintptr_t weight,
                                          std::uintptr_t cls, std::uintptr_t position, std::uintptr_t norm_weight,
                                          std::uintptr_t norm_bias, std::int64_t images, std::int64_t height,
                                          std::int64_t width, std::int64_t patch, std::int64_t columns,
                                          std::array<double, 3> mean, std::array<double, 3> std, double eps,
                                          DType dtype, int multiprocessors) {
    return {output, pixels, weight,  cls,  position, norm_weight, norm_bias, images,         height,
            width,  patch,  columns, mean, std,      eps,         dtype,     multiprocessors};
}

py::dict patch_embed_plan(const PatchEmbedArguments& arguments) {
    const PatchEmbedPlan plan = plan_patch_embed(arguments);
    py::dict report;
    report["strips"] = plan.strips;
    report["row_tiles"] = plan.row_tiles;
    report["column_tiles"] = plan.column_tiles;
    report["blocks"] = py::make_tuple(plan.row_blocks, plan.column_blocks);
    report["shared_bytes"] = plan.shared_bytes;
    report["copy_bytes"] = plan.copy_bytes;
    report["pixel_pairs"] = plan.pixel_pairs;
    return report;
}

ResizeArguments resize_arguments(std::uintptr_t output, std::uintptr_t between, std::uintptr_t pixels,
                                 std::uintptr_t images, std::uintptr_t tables, std::int64_t num_images,
                                 std::int64_t lines, std::int64_t size, std::array<int, 3> fill) {
    return {output, between, pixels, images, tables, num_images, lines, size, fill};
}

py::dict resize_plan(const ResizeArguments& arguments) {
    const ResizePlan plan = plan_resize(arguments);
    py::dict report;
    report["threads"] = plan.threads;
    report["blocks"] = py::make_tuple(plan.first_blocks, plan.second_blocks);
    return report;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of llava-fast. Pointers are integers (tensor.data_ptr()), strides are in elements.";

    py::enum_<DType>(module, "DType")
        .value("float32", DType::float32)
        .value("float16", DType::float16)
        .value("bfloat16", DType::bfloat16);

    module.def("device_count", &device_count, "Number of CUDA devices; 0 where there is no GPU or no driver.");
    module.def("versions", &versions,
               "CUDA versions of the runtime in this file and of the driver (0 where there is none), as 1000 * major + "
               "10 * minor.");
    module.def("compiled_architectures", &compiled_architectures,
               "Compute capabilities the kernels were compiled for, such as [80, 90].");

    const auto with_rms_norm_arguments = [&](const char* name, auto function, const char* doc, auto... extra) {
        module.def(name, function, doc, py::kw_only(), py::arg("output"), py::arg("input"), py::arg("weight"),
                   py::arg("rows"), py::arg("columns"), py::arg("output_stride"), py::arg("input_stride"),
                   py::arg("eps"), py::arg("dtype"), py::arg("residual") = 0, py::arg("residual_stride") = 0,
                   py::arg("residual_output") = 0, py::arg("residual_output_stride") = 0, extra...);
    };
    with_rms_norm_arguments(
        "rms_norm_forward", launching(rms_norm_arguments, launch_rms_norm),
        "Queue output = weight * rms_norm(input [+ residual]) on a stream of the current device; the sum goes to "
        "residual_output. Raises ValueError for a wrong argument and RuntimeError when CUDA refuses the launch.",
        py::arg("stream") = 0);
    with_rms_norm_arguments("rms_norm_plan", planning(rms_norm_arguments, rms_norm_plan),
                            "Check the arguments of rms_norm_forward and say how it would launch; needs no GPU.");

    const auto with_patch_embed_arguments = [&](const char* name, auto function, const char* doc, auto... extra) {
        module.def(name, function, doc, py::kw_only(), py::arg("output"), py::arg("pixels"), py::arg("weight"),
                   py::arg("cls"), py::arg("position"), py::arg("norm_weight"), py::arg("norm_bias"),
                   py::arg("images"), py::arg("height"), py::arg("width"), py::arg("patch"), py::arg("columns"),
                   py::arg("mean"), py::arg("std"), py::arg("eps"), py::arg("dtype"), py::arg("multiprocessors"),
                   extra...);
    };
    with_patch_embed_arguments(
        "patch_embed_forward", launching(patch_embed_arguments, launch_patch_embed),
        "Queue uint8 images [images, height, width, 3] to tokens after CLS, position and LayerNorm on a stream of the "
        "current device; weight is [patch * patch * 3, columns]. Raises ValueError for a wrong argument and "
        "RuntimeError when CUDA refuses the launch.",
        py::arg("stream") = 0);
    with_patch_embed_arguments("patch_embed_plan", planning(patch_embed_arguments, patch_embed_plan),
                               "Check the arguments of patch_embed_forward and say how it would launch; needs no GPU.");

    const auto with_resize_arguments = [&](const char* name, auto function, const char* doc, auto... extra) {
        module.def(name, function, doc, py::kw_only(), py::arg("output"), py::arg("between"), py::arg("pixels"),
                   py::arg("images"), py::arg("tables"), py::arg("num_images"), py::arg("lines"), py::arg("size"),
                   py::arg("fill"), extra...);
    };
    with_resize_arguments(
        "resize_forward", launching(resize_arguments, launch_resize),
        "Queue the resize of uint8 images of any sizes, as planned by llava_fast.ops.resize, to [num_images, size, "
        "size, 3] on a stream of the current device. Raises ValueError for a wrong argument and RuntimeError when "
        "CUDA refuses the launch.",
        py::arg("stream") = 0);
    with_resize_arguments("resize_plan", planning(resize_arguments, resize_plan),
                          "Check the arguments of resize_forward and say how it would launch; needs no GPU.");
}
