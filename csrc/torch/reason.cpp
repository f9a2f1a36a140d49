#include <dlfcn.h>

#include <stdexcept>

#include "common.h"

namespace randlora {
namespace {

// torch 2.11 lacks this function, so it is looked up at run time.
std::string reason_of_torch() {
  using What = const char* (*)();
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* what = torch ? dlsym(torch, "torch_exception_get_what_without_backtrace") : nullptr;
  const char* text = what ? reinterpret_cast<What>(what)() : nullptr;
  return text ? text : "";
}

}  // namespace

void throw_with_reason(const std::exception& error) {
  const std::string said = error.what();
  if (said.find("API call failed") == std::string::npos) throw;
  const std::string reason = reason_of_torch();
  if (!reason.empty()) throw std::runtime_error("randlora: " + reason);
  throw std::runtime_error(
      "randlora: torch refused, most likely for lack of memory; its own words "
      "are on stderr. " +
      said);
}

}  // namespace randlora
