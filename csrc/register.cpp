// The Python module. Importing it runs the static registrations beside the kernels; the schemas are defined
// in Python. What it offers itself is information about the build.
#include <Python.h>
#include <torch/headeronly/version.h>

#include "cpu/kernels.h"

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

#ifdef SGR_CUDA_ARCHITECTURES
constexpr char kCudaArchitectures[] = SGR_CUDA_ARCHITECTURES, kCudaCompiler[] = SGR_CUDA_COMPILER;
#else
constexpr char kCudaArchitectures[] = "", kCudaCompiler[] = "";
#endif

// The operators as the kernels in this binary implement them. The dispatcher checks no arguments: with other schemas
// than sgr_kernels/backends/schemas.py has, the binary must not be called.
constexpr char kSchemas[] =
    "product(Tensor gradient, Tensor spectrum, str precision) -> Tensor\n"
    "quadratic_form(Tensor gradient, Tensor spectrum, bool with_product, str precision) -> (Tensor, Tensor)\n"
    "cross_spectrum(Tensor a, Tensor b, int rows, int columns, bool signed, str precision) -> Tensor";

// The operators of the CUDA kernels alone.
constexpr char kCudaSchemas[] =
    "update(Tensor perturbation, Tensor(a!) values, Tensor(b!) mean, Tensor(c!) scale, Tensor(d!) table, "
    "Tensor(e!) spectrum, Tensor(f!) updates, Tensor(g!) skipped, Tensor(h!) arrivals, Tensor(i!) arranged, "
    "str binning, float decay, float target_variance, bool clip, str precision) -> ()\n"
    "arrange(Tensor spectrum, Tensor(a!) arranged, int height, int width) -> ()\n"
    "arranged_quadratic_form(Tensor gradient, Tensor spectrum, Tensor arranged, bool with_product, str precision) -> "
    "(Tensor, Tensor)";

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s, s:s, s:s, s:s, s:s, s:s}", "schemas", kSchemas, "cuda_schemas", kCudaSchemas, "torch", TORCH_VERSION, "compiler", kCompiler,
                       "cuda_compiler", kCudaCompiler, "cuda_architectures", kCudaArchitectures);
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  const char* names[8];
  const int count = sgr::cpu::instruction_sets(names, 8);
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && i < count; ++i) {
    PyObject* name = PyUnicode_FromString(names[i]);
    if (name == nullptr || PyList_Append(list, name) != 0) Py_CLEAR(list);
    Py_XDECREF(name);
  }
  return list;
}

PyObject* select_instruction_set(PyObject*, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8AndSize(argument, nullptr);
  if (name == nullptr) return nullptr;
  if (!sgr::cpu::select_instruction_set(name)) {
    return PyErr_Format(PyExc_ValueError, "instruction set %R is not one of instruction_sets()", argument);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this binary was built with."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "CPU instruction sets that can be used here, best first."},
    {"select_instruction_set", select_instruction_set, METH_O, "Use this one (for tests)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
