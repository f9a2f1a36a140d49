// Which card is current, on cards that remember whether a context was made on them; and a card that
// the library was not built for.
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "cuda/device/context.cpp"

using namespace randlora;

int main() {
  auto& has_context = cuda_on_cpu::has_context;
  // A new thread, to which card 0 is current without a context, works on card 1.
  std::thread([&] {
    cuda::make_current(1);
    EXPECT(cuda_on_cpu::current_card == 1 && has_context[1], "card 1 is not current");
    EXPECT(!has_context[0], "a context was made on a card that nobody uses");
  }).join();
  // Where the card is current already nothing is set.
  cuda::make_current(0);
  EXPECT(!has_context[0], "the current card was set again");

  bool refused = false;
  try {
    cuda::make_current(7);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused && cuda_on_cpu::current_card == 0, "a card that is not there");

  EXPECT(cuda::refusal(0) == nullptr && cuda::refusal(1) == nullptr, "cards with code are refused");
  setenv("CUDA_ON_CPU_NO_CODE", "1", 1);
  EXPECT(cuda::refusal(0) == nullptr, "the other card is refused, too");
  const char* why = cuda::refusal(1);
  EXPECT(why && std::string(why).find("no kernel image") == 0,
         "a card without code is not refused");
  refused = false;
  try {
    cuda::refusal(7);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused, "a card that is not there counts as one without code");
  return finish();
}
