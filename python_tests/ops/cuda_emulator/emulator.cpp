#include <tiling.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "machine.cuh"
#include "sanitizers.h"

namespace emulator {

dim3 thread_index, block_index, grid_size, block_size;
char* dynamic_shared_memory;
int most_shared_bytes = 163 * 1024;  // of an sm_80

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  char* shared;
  const char* global;
  bool inside;
};

enum class State { running, at_warp, at_barrier, done };

// A CUDA thread. It outlives its block and takes the same place in the next one.
struct Fiber {
  Context context;
  State state = State::running;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const void* instruction = nullptr;
  const void* input = nullptr;
  void* result = nullptr;
  std::deque<Copy> open, committed;
  unsigned barriers = 0, warp_barriers = 0;  // passed
};

std::deque<Fiber> fibers;
std::unique_ptr<char[]> shared_memory;
int shared_bytes_of_block;
Fiber* current = nullptr;
Context scheduler;
const std::function<void()>* body = nullptr;
void (*warp_function)(const void* const*, void* const*) = nullptr;
std::mt19937 drawn(1);
// What happened before what, for ThreadSanitizer: addresses stand for events. Barriers take two in turn, since a thread
// may arrive at the next one before another has left this one.
char block_begun, block_ended, barriers[2], warp_barriers[32][2];

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
  std::abort();
}

void yield(State state) {
  current->state = state;
  switch_context(current->context, scheduler);
}

void fiber_main() {
  arrive_from(scheduler);
  for (;;) {
    happens_after(&block_begun);
    (*body)();
    if (!current->open.empty() || !current->committed.empty()) fail("a thread ended with copies under way");
    happens_before(&block_ended);
    yield(State::done);
  }
}

void run(int index) {
  current = &fibers[static_cast<size_t>(index)];
  thread_index = dim3(static_cast<unsigned>(index));
  switch_context(scheduler, current->context);
}

// Runs the lanes of a warp, in a drawn order, up to where they meet; false once all wait at the block's barrier or are
// done.
bool step(int first) {
  const unsigned start = drawn(), stride = drawn() | 1u;
  int at_warp = 0, done = 0, at_barrier = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    const int index = first + static_cast<int>((start + i * stride) % kWarp);
    Fiber& fiber = fibers[static_cast<size_t>(index)];
    if (fiber.state == State::running) run(index);
    at_warp += fiber.state == State::at_warp;
    at_barrier += fiber.state == State::at_barrier;
    done += fiber.state == State::done;
  }
  if (done + at_barrier == kWarp) {
    if (done != 0 && at_barrier != 0) fail("lanes of a warp ended while others wait at a barrier");
    return false;
  }
  if (at_warp != kWarp) fail("lanes of a warp wait at a warp's instruction for lanes that are elsewhere");
  const void* inputs[kWarp];
  void* results[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    Fiber& fiber = fibers[static_cast<size_t>(first + lane)];
    if (fiber.instruction != fibers[static_cast<size_t>(first)].instruction) {
      fail("lanes of a warp met at different instructions");
    }
    inputs[lane] = fiber.input, results[lane] = fiber.result;
    fiber.state = State::running;
  }
  warp_function(inputs, results);
  return true;
}

}  // namespace

void with_warp(const void* instruction, const void* mine, void* result,
               void (*together)(const void* const*, void* const*)) {
  current->instruction = instruction, current->input = mine, current->result = result;
  warp_function = together;
  yield(State::at_warp);
}

void warp_barrier() {
  char* event = &warp_barriers[thread_index.x / kWarp][current->warp_barriers++ % 2];
  happens_before(event);
  with_warp("syncwarp", nullptr, nullptr, [](const void* const*, void* const*) {});
  happens_after(event);
}

void block_barrier() {
  char* event = &barriers[current->barriers++ % 2];
  happens_before(event);
  yield(State::at_barrier);
  happens_after(event);
}

void draw_orders_from(unsigned seed) { drawn.seed(seed); }

void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("cp.async to an address that is no multiple of 16");
  if (inside && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp.async from an address that is no multiple of 16");
  writes(shared, 16);
  std::memset(shared, 0xff, 16);
  current->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), inside});
}

void copy_async_commit() {
  for (const Copy& copy : current->open) current->committed.push_back(copy);
  current->open.clear();
}

void copy_async_wait() {
  for (const Copy& copy : current->committed) {
    writes(copy.shared, 16);
    if (copy.inside) reads(copy.global, 16), std::memcpy(copy.shared, copy.global, 16);
    if (!copy.inside) std::memset(copy.shared, 0, 16);
  }
  current->committed.clear();
}

void begin_launch(dim3 grid, int threads, int shared_bytes) {
  if (threads % kWarp != 0) fail("a block that is no multiple of a warp");
  if (threads > 1024 || grid.y > 65535 || grid.z > 65535) fail("a launch that no GPU takes");
  grid_size = grid, block_size = dim3(static_cast<unsigned>(threads));
  shared_bytes_of_block = shared_bytes;
  // Exactly as long as asked for, so that AddressSanitizer sees what lies behind.
  shared_memory.reset(new char[static_cast<size_t>(shared_bytes)]);
  dynamic_shared_memory = shared_memory.get();
  if (reinterpret_cast<uintptr_t>(dynamic_shared_memory) % 16 != 0) fail("shared memory at no multiple of 16");
  while (static_cast<int>(fibers.size()) < threads) {
    Fiber& fiber = fibers.emplace_back();
    make_context(fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
  }
}

void run_block(const std::function<void()>& thread, int threads) {
  body = &thread;
  std::memset(dynamic_shared_memory, 0xff, static_cast<size_t>(shared_bytes_of_block));
  happens_before(&block_begun);
  begin_scheduling();
  std::vector<int> warps;
  for (int index = 0; index < threads; ++index) {
    Fiber& fiber = fibers[static_cast<size_t>(index)];
    fiber.state = State::running, fiber.barriers = fiber.warp_barriers = 0;
  }
  for (int done = 0; done < threads;) {
    for (int first = 0; first < threads; first += kWarp) warps.push_back(first);
    // Either a warp runs as far ahead as the barriers allow, or the warps advance one instruction at a time.
    const bool ahead = drawn() % 2 == 0;
    while (!warps.empty()) {
      int& first = warps[drawn() % warps.size()];
      bool more = step(first);
      while (more && ahead) more = step(first);
      if (!more) std::swap(first, warps.back()), warps.pop_back();
    }
    for (int index = 0; index < threads; ++index) {
      Fiber& fiber = fibers[static_cast<size_t>(index)];
      done += fiber.state == State::done;
      if (fiber.state == State::at_barrier) fiber.state = State::running;
    }
    if (done != 0 && done != threads) fail("threads ended while others wait at a barrier");
  }
  end_scheduling();
  happens_after(&block_ended);
}

std::vector<unsigned> drawn_blocks(dim3 grid) {
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  std::shuffle(blocks.begin(), blocks.end(), drawn);
  return blocks;
}

}  // namespace emulator

extern "C" void emulated_order(unsigned seed) { emulator::draw_orders_from(seed); }

extern "C" void emulated_shared_bytes(int bytes) { emulator::most_shared_bytes = bytes; }

void pyard::cuda::check_row_address(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    emulator::fail("a row or chunk at an address that is no multiple of 16");
}

// The kernels' tiles of one block of queries (or, for a block of keys, of the queries that see it), three numbers each.
extern "C" int emulated_tiles(const pyard::cuda::BlockMask* mask, int step, bool queries_of_keys, bool join,
                              int tile_rows, int* found) {
  using namespace pyard::cuda;
  Seen seen = queries_of_keys ? seeing_queries(*mask, step) : seen_keys(*mask, step);
  if (join) seen = joined(seen);
  const int count = tile_count(seen, tile_rows);
  for (int i = 0; i < count; ++i) {
    const Tile tile = tile_at(seen, tile_rows, i);
    found[3 * i] = tile.begin, found[3 * i + 1] = tile.rows, found[3 * i + 2] = tile.other;
  }
  return count;
}
