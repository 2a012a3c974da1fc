#include "emulation/block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace emulation {

namespace {

constexpr uint32_t bit(unsigned number) { return uint32_t(1) << number; }
constexpr uint32_t first_bits(unsigned count) { return count >= 32 ? ~0U : bit(count) - 1; }

// Calls inside of a template are the same call in all of its instances.
bool is_same_place(const Call& a, const Call& b) {
  return a.place.line() == b.place.line() && a.place.column() == b.place.column() &&
         (a.place.file_name() == b.place.file_name() ||
          std::strcmp(a.place.file_name(), b.place.file_name()) == 0);
}

std::string name_of(const Call& call) {
  return std::string(call.name) + " at " + call.place.file_name() + ":" +
         std::to_string(call.place.line());
}

std::string hexadecimal(uint32_t mask) {
  char text[sizeof("0x12345678")];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// "lane 3" or "lanes 3, 4, 7".
std::string name_of_lanes(uint32_t mask) {
  std::string text = std::popcount(mask) == 1 ? "lane " : "lanes ";
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    if (rest != mask) text += ", ";
    text += std::to_string(std::countr_zero(rest));
  }
  return text;
}

std::string name_of_index(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

}  // namespace

// Never destroyed: threads of the system may launch until the process ends.
Block& the_block = *new Block;

template <typename What>
void Block::fail(const What& what) {
  report_ = name_of_block() + what();
  leave_for_good();
}

template <typename What>
void Block::fail_at(const Call& call, const What& what) {
  fail([&] { return ", " + name_of_current() + ": " + emulation::name_of(call) + ": " + what(); });
}

void Block::leave_for_good() {
  Fiber& own = *running_;
  running_ = &caller_;
  own.go_to(caller_);
  __builtin_unreachable();
}

void Block::run(const Launch& launch, Order& order, SharedMemory& shared) {
  order_ = &order;
  shared_ = &shared;
  shared.fill();
  start(launch);
  choose();
  running_ = &fiber_of_current();
  caller_.go_to(*running_);
  if (report_.empty()) {
    const std::string damage = shared.damage();
    if (damage.empty()) return;
    report_ = name_of_block() + ": " + damage + ", by one of its threads";
  }
  idle_.clear();
  for (const auto& fiber : fibers_) {
    fiber->restart();
    idle_.push_back(fiber.get());
  }
  throw std::runtime_error(std::exchange(report_, {}));
}

void Block::start(const Launch& launch) {
  launch_ = &launch;
  const dim3 size = launch.block;
  num_threads_ = size.x * size.y * size.z;
  num_warps_ = (num_threads_ + kLanes - 1) / kLanes;
  num_exited_ = num_arrived_ = 0;
  turn_ = 0;
  ready_warps_ = first_bits(num_warps_);
  for (unsigned w = 0; w < num_warps_; ++w) {
    Warp& warp = warps_[w];
    warp.existing = warp.ready = first_bits(std::min(kLanes, num_threads_ - w * kLanes));
    warp.at_warp = warp.at_block = warp.exited = 0;
  }
  std::fill_n(fiber_of_.begin(), num_threads_, nullptr);
  const dim3 indexed = indexed_block_;
  if (indexed.x != size.x || indexed.y != size.y || indexed.z != size.z) {
    for (unsigned i = 0; i < num_threads_; ++i) {
      indices_[i] = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    }
    indexed_block_ = size;
  }
}

void Block::fiber_body() { the_block.work(); }

void Block::work() {
  Fiber& own = *running_;
  own.arrived();
  for (;;) {
    launch_->thread(launch_->context);
    exit();
    const bool is_any_ready = choose();
    if (is_any_ready && fiber_of_[current()] == nullptr) {
      fiber_of_[current()] = &own;
      continue;
    }
    if (!is_any_ready && num_exited_ != num_threads_) {
      fail([&] { return ": deadlock: " + waiting_threads(); });
    }
    idle_.push_back(&own);
    running_ = is_any_ready ? fiber_of_[current()] : &caller_;
    own.go_to(*running_);
  }
}

Fiber& Block::fiber_of_current() {
  Fiber*& fiber = fiber_of_[current()];
  if (fiber == nullptr) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&fiber_body, unsigned(fibers_.size())));
      idle_.push_back(fibers_.back().get());
    }
    fiber = idle_.back();
    idle_.pop_back();
  }
  return *fiber;
}

bool Block::choose() {
  if (turn_ == 0) {
    if (ready_warps_ == 0) return false;
    warp_ = order_->next(ready_warps_);
    ready_warps_ &= ~bit(warp_);
    turn_ = std::exchange(warp().ready, 0);
  }
  lane_ = order_->next(turn_);
  turn_ &= ~bit(lane_);
  threadIdx = indices_[current()];
  return true;
}

void Block::wait() {
  Fiber& own = *running_;
  if (!choose()) fail([&] { return ": deadlock: " + waiting_threads(); });
  Fiber& next = fiber_of_current();
  if (&next == &own) return;
  running_ = &next;
  own.go_to(next);
}

void Block::exit() {
  Warp& warp = this->warp();
  warp.exited |= bit(lane_);
  ++num_exited_;
  if (!shared_->borders_are_whole()) {
    fail([&] {
      return ", " + name_of_current() + ": " + shared_->damage() + ", when this thread ended";
    });
  }
  if (num_arrived_ != 0) {
    fail([&] {
      return ", " + name_of_current() + ": divergent barrier: this thread ended, while " +
             waiting_threads();
    });
  }
  for (uint32_t rest = warp.at_warp; rest != 0; rest &= rest - 1) {
    const unsigned other = unsigned(std::countr_zero(rest));
    if (warp.masks[other] & bit(lane_)) {
      fail([&] {
        return ", " + name_of(warp_ * kLanes + other) + ": " +
               emulation::name_of(warp.calls[other]) + ": its mask " +
               hexadecimal(warp.masks[other]) + " names lane " + std::to_string(lane_) +
               ", which ended without coming there";
      });
    }
  }
}

void Block::meet_block(const Call& call) {
  if (!shared_->borders_are_whole()) {
    fail_at(call, [&] { return shared_->damage() + ", before this call"; });
  }
  if (num_exited_ != 0) {
    fail_at(call, [&] {
      return "divergent barrier: " + std::to_string(num_exited_) + " of the block's " +
             std::to_string(num_threads_) + " threads had ended";
    });
  }
  Warp& warp = this->warp();
  if (num_arrived_ == 0) {
    first_arrived_ = current();
  } else {
    const Call& first = warps_[first_arrived_ / kLanes].calls[first_arrived_ % kLanes];
    if (!is_same_place(first, call)) {
      fail_at(call, [&] { return "divergent barrier: " + waiting_threads(); });
    }
  }
  warp.at_block |= bit(lane_);
  warp.calls[lane_] = call;
  if (++num_arrived_ == num_threads_) release_block();
  wait();
}

void Block::release_block() {
  num_arrived_ = 0;
  ready_warps_ = first_bits(num_warps_);
  for (unsigned w = 0; w < num_warps_; ++w) {
    warps_[w].ready = std::exchange(warps_[w].at_block, 0);
  }
}

void Block::meet_warp(const Call& call, unsigned mask) {
  check_mask(call, mask);
  if (come_to_warp(call, mask)) release_warp(mask);
  wait();
}

uint64_t Block::meet_exchange(const Call& call, unsigned mask, uint64_t value, unsigned source) {
  check_mask(call, mask);
  Warp& warp = this->warp();
  const unsigned lane = lane_;
  if (!(mask & bit(source))) {
    fail_at(call, [&] {
      return "it takes the value of lane " + std::to_string(source) + ", which its mask " +
             hexadecimal(mask) + " leaves out";
    });
  }
  warp.values[lane] = value;
  warp.sources[lane] = uint8_t(source);
  if (come_to_warp(call, mask)) {
    const std::array<uint64_t, kLanes> values = warp.values;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const unsigned other = unsigned(std::countr_zero(rest));
      warp.values[other] = values[warp.sources[other]];
    }
    release_warp(mask);
  }
  wait();
  return warp.values[lane];
}

void Block::check_mask(const Call& call, unsigned mask) {
  if (!shared_->borders_are_whole()) {
    fail_at(call, [&] { return shared_->damage() + ", before this call"; });
  }
  Warp& warp = this->warp();
  if (!(mask & bit(lane_))) {
    fail_at(call, [&] {
      return "its mask " + hexadecimal(mask) + " leaves out the calling lane " +
             std::to_string(lane_);
    });
  }
  if (mask & (warp.exited | ~warp.existing)) {
    fail_at(call, [&] {
      const uint32_t exited = mask & warp.exited;
      return "its mask " + hexadecimal(mask) + " names " +
             name_of_lanes(exited ? exited : mask & ~warp.existing) +
             (exited ? ", which ended before" : ", which the block does not have");
    });
  }
}

bool Block::come_to_warp(const Call& call, unsigned mask) {
  Warp& warp = this->warp();
  warp.calls[lane_] = call;
  warp.masks[lane_] = mask;
  const uint32_t here = warp.at_warp & mask;
  if (here != 0) {
    // By the time the last lane comes, each was compared with one that came before it. Lanes whose
    // masks are not the same may still have missed each other, so the last one compares them all.
    const bool is_last = (here | bit(lane_)) == mask;
    for (uint32_t rest = is_last ? here : here & -here; rest != 0; rest &= rest - 1) {
      const unsigned other = unsigned(std::countr_zero(rest));
      const Call& others = warp.calls[other];
      if (warp.masks[other] != mask) {
        fail_at(call, [&] {
          return "its mask is " + hexadecimal(mask) + ", while lane " + std::to_string(other) +
                 " of it waits in " + emulation::name_of(others) + " with the mask " +
                 hexadecimal(warp.masks[other]);
        });
      }
      if (!is_same_place(others, call)) {
        fail_at(call, [&] {
          return "lane " + std::to_string(other) + " of its mask " + hexadecimal(mask) +
                 " waits in another place, in " + emulation::name_of(others);
        });
      }
    }
  }
  warp.at_warp |= bit(lane_);
  return (warp.at_warp & mask) == mask;
}

void Block::release_warp(unsigned mask) {
  Warp& warp = this->warp();
  warp.at_warp &= ~mask;
  warp.ready |= mask;
  ready_warps_ |= bit(warp_);
}

std::string Block::name_of_block() const {
  return std::string("kernel ") + launch_->kernel + ", block " +
         name_of_index(blockIdx.x, blockIdx.y, blockIdx.z);
}

std::string Block::name_of(unsigned thread) const {
  const uint3 index = indices_[thread];
  return "thread " + name_of_index(index.x, index.y, index.z);
}

std::string Block::waiting_threads() const {
  struct Group {
    const Call* call;
    unsigned first;
    unsigned count;
    uint32_t missing;
  };
  std::vector<Group> groups;
  for (unsigned thread = 0; thread < num_threads_; ++thread) {
    const Warp& warp = warps_[thread / kLanes];
    const unsigned lane = thread % kLanes;
    if (!((warp.at_warp | warp.at_block) & bit(lane))) continue;
    const Call& call = warp.calls[lane];
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return is_same_place(*group.call, call);
    });
    if (same != groups.end()) {
      ++same->count;
    } else {
      const bool at_warp = warp.at_warp & bit(lane);
      groups.push_back({&call, thread, 1, at_warp ? warp.masks[lane] & ~warp.at_warp : 0});
    }
  }
  std::string text;
  for (const Group& group : groups) {
    if (!text.empty()) text += "; ";
    text += group.count == 1 ? "" : std::to_string(group.count) + " threads, the first of them ";
    text += name_of(group.first) + (group.count == 1 ? ", waits in " : ", wait in ");
    text += emulation::name_of(*group.call);
    if (group.missing != 0) text += " for " + name_of_lanes(group.missing);
  }
  return text;
}

}  // namespace emulation
