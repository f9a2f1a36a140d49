// randlora_ext._C: loads the operators, reports how they were built, and exposes the host-side
// specification functions. Everything else goes through torch.ops.randlora. Only Python's limited
// API is used, so one file serves every Python from 3.10 on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../core/ternary_spec.h"
#include "../cpu/dispatch.h"
#include "../torch/backend.h"

#if defined(__clang__)
#define RANDLORA_COMPILER "clang " __clang_version__
#else
#define RANDLORA_COMPILER "g++ " __VERSION__
#endif
#ifndef RANDLORA_VERSION
#define RANDLORA_VERSION "unknown"
#endif

namespace {

// C++ exceptions become Python's RuntimeError.
template <class Body>
PyObject* raising(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* list_of(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* item = list ? PyUnicode_FromString(name.c_str()) : nullptr;
    if (!item || PyList_Append(list, item) != 0) Py_CLEAR(list);
    Py_XDECREF(item);
  }
  return list;
}

// Converters of PyArg_ParseTuple, whose own formats for unsigned numbers do not check the range.
int to_word(PyObject* object, void* out) {
  const unsigned long value = PyLong_AsUnsignedLong(object);
  if (PyErr_Occurred()) return 0;
  if (value > UINT32_MAX) {
    PyErr_Format(PyExc_OverflowError, "%lu does not fit 32 bits", value);
    return 0;
  }
  *static_cast<uint32_t*>(out) = static_cast<uint32_t>(value);
  return 1;
}

int to_seed(PyObject* object, void* out) {
  *static_cast<uint64_t*>(out) = PyLong_AsUnsignedLongLong(object);
  return PyErr_Occurred() ? 0 : 1;
}

PyObject* build_info(PyObject*, PyObject*) {
  return raising([] {
    return Py_BuildValue("{s:s,s:s,s:i,s:N}", "version", RANDLORA_VERSION, "compiler",
                         RANDLORA_COMPILER, "spec_version", int{randlora::kSpecVersion},
                         "built_isas", list_of(randlora::built_isas()));
  });
}

PyObject* available_isas(PyObject*, PyObject*) {
  return raising([] { return list_of(randlora::available_isas()); });
}

PyObject* isa(PyObject*, PyObject*) {
  return raising([] { return PyUnicode_FromString(randlora::cpu_kernels().isa); });
}

PyObject* load_cuda(PyObject*, PyObject* args, PyObject* named) {
  const char* path = nullptr;
  int serve_cpu_tensors = 0;
  char path_name[] = "path", serve_name[] = "serve_cpu_tensors";
  char* names[] = {path_name, serve_name, nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, named, "s|p", names, &path, &serve_cpu_tensors)) {
    return nullptr;
  }
  return raising([&] {
    randlora::load_cuda(path, serve_cpu_tensors != 0);
    Py_RETURN_NONE;
  });
}

PyObject* cuda_build(PyObject*, PyObject*) {
  return raising([] { return PyUnicode_FromString(randlora::cuda_build().c_str()); });
}

PyObject* philox4x32_10(PyObject*, PyObject* args) {
  uint32_t counter[4], key[2];
  if (!PyArg_ParseTuple(args, "(O&O&O&O&)(O&O&)", to_word, counter, to_word, counter + 1, to_word,
                        counter + 2, to_word, counter + 3, to_word, key, to_word, key + 1)) {
    return nullptr;
  }
  const auto out =
      randlora::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return Py_BuildValue("(IIII)", out.v[0], out.v[1], out.v[2], out.v[3]);
}

PyObject* threshold(PyObject*, PyObject* args) {
  double density = 0;
  if (!PyArg_ParseTuple(args, "d", &density)) return nullptr;
  return PyLong_FromUnsignedLong(randlora::threshold(density));
}

PyObject* element(PyObject*, PyObject* args) {
  uint64_t seed = 0;
  uint32_t role = 0, row = 0, col = 0, limit = 0;
  if (!PyArg_ParseTuple(args, "O&O&O&O&O&", to_seed, &seed, to_word, &role, to_word, &row, to_word,
                        &col, to_word, &limit)) {
    return nullptr;
  }
  return PyLong_FromLong(randlora::element(seed, role, row, col, limit));
}

// inspect.signature reads the first line of each description.
PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "build_info($module, /)\n--\n\n"},
    {"available_isas", available_isas, METH_NOARGS,
     "available_isas($module, /)\n--\n\n"
     "Kernel sets of this build that this processor can run, best first."},
    {"isa", isa, METH_NOARGS,
     "isa($module, /)\n--\n\n"
     "The kernel set in use. Raises RuntimeError where RANDLORA_ISA names one that cannot run."},
    {"load_cuda", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(load_cuda)),
     METH_VARARGS | METH_KEYWORDS,
     "load_cuda($module, /, path, serve_cpu_tensors=False)\n--\n\n"
     "Loads the CUDA kernels. Raises RuntimeError with the reason where that cannot be."},
    {"cuda_build", cuda_build, METH_NOARGS,
     "cuda_build($module, /)\n--\n\nCompiler and architectures; empty: not loaded."},
    {"philox4x32_10", philox4x32_10, METH_VARARGS,
     "philox4x32_10($module, counter, key, /)\n--\n\nOf four and two words of 32 bits."},
    {"threshold", threshold, METH_VARARGS,
     "threshold($module, density, /)\n--\n\n"
     "Integer threshold of a density; 0 where it is outside (0, 1]."},
    {"element", element, METH_VARARGS,
     "element($module, seed, role, row, col, threshold, /)\n--\n\n-1, 0 or 1."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled part of randlora_ext: operators, build information, specification functions.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
