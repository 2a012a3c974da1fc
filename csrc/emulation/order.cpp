#include "emulation/order.h"

#include <charconv>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>

namespace emulation {

Order Order::of_launch(uint64_t launch_number) {
  constexpr const char* kVariable = "INTROKERNELS_EMULATION_ORDER";
  constexpr std::string_view kShuffled = "shuffled";
  const char* const variable = std::getenv(kVariable);
  const std::string_view asked = variable == nullptr ? "" : variable;
  if (asked.empty() || asked == "ascending") return {Kind::kAscending, 0};
  if (asked == "descending") return {Kind::kDescending, 0};
  uint64_t seed = 0;
  bool is_known = asked == kShuffled;
  if (asked.starts_with("shuffled:")) {
    const std::string_view digits = asked.substr(kShuffled.size() + 1);
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), seed);
    is_known = error == std::errc() && end == digits.end();
  }
  if (!is_known) {
    throw std::runtime_error(std::string(kVariable) + " is '" + std::string(asked) +
                             "'; known are 'ascending', 'descending', 'shuffled' and "
                             "'shuffled:<seed>'");
  }
  return {Kind::kShuffled, (seed << 32) + launch_number};
}

void Order::set_num_blocks(uint64_t count) {
  num_blocks_ = count;
  if (kind_ != Kind::kShuffled || count < 2) return;
  offset_ = random() % count;
  do {
    factor_ = random() % count;
  } while (std::gcd(factor_, count) != 1);
}

uint64_t Order::block(uint64_t turn) const {
  __extension__ using Wide = unsigned __int128;
  if (kind_ == Kind::kDescending) return num_blocks_ - 1 - turn;
  return uint64_t((Wide(turn) * factor_ + offset_) % num_blocks_);
}

}  // namespace emulation
