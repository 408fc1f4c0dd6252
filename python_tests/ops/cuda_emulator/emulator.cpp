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

namespace emulator {

dim3 thread_index, block_index, grid_size, block_size;
char* dynamic_shared_memory;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  char* shared;
  const char* global;
  bool inside;
};

enum class State { running, at_warp, at_barrier, done };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::running;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const void* instruction = nullptr;
  const void* input = nullptr;
  void* result = nullptr;
  std::deque<Copy> open, committed;
};

std::vector<Fiber> fibers;
std::vector<char> shared_bytes_of_block;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
void (*warp_function)(const void* const*, void* const*) = nullptr;
std::mt19937 order(1);

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s (block %u %u %u)\n", what, block_index.x, block_index.y, block_index.z);
  std::abort();
}

void fiber_main() {
  (*body)();
  current->state = State::done;
  if (!current->open.empty() || !current->committed.empty()) fail("a thread ended with copies under way");
  _longjmp(scheduler, 1);
}

void yield(State state) {
  current->state = state;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void run(int index) {
  current = &fibers[index];
  thread_index = dim3(static_cast<unsigned>(index));
  current->state = State::running;
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->resume, 1);
  current->started = true;
  setcontext(&current->start);
}

// Runs a warp until all of its lanes are at the block's barrier or done.
void run_warp(int first) {
  for (;;) {
    int at_warp = 0, done = 0, at_barrier = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = fibers[first + lane];
      if (fiber.state == State::running) run(first + lane);
      at_warp += fiber.state == State::at_warp;
      at_barrier += fiber.state == State::at_barrier;
      done += fiber.state == State::done;
    }
    if (done + at_barrier == kWarp) {
      if (done != 0 && at_barrier != 0) fail("lanes of a warp ended while others wait at a barrier");
      return;
    }
    if (at_warp != kWarp) fail("lanes of a warp wait at a warp's instruction for lanes that are elsewhere");
    const void* inputs[kWarp];
    void* results[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = fibers[first + lane];
      if (fiber.instruction != fibers[first].instruction) fail("lanes of a warp met at different instructions");
      inputs[lane] = fiber.input, results[lane] = fiber.result;
      fiber.state = State::running;
    }
    warp_function(inputs, results);
  }
}

}  // namespace

void with_warp(const void* instruction, const void* mine, void* result,
               void (*together)(const void* const*, void* const*)) {
  current->instruction = instruction, current->input = mine, current->result = result;
  warp_function = together;
  yield(State::at_warp);
}

void block_barrier() { yield(State::at_barrier); }

void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("cp.async to an address that is no multiple of 16");
  if (inside && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp.async from an address that is no multiple of 16");
  std::memset(shared, 0xff, 16);
  current->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), inside});
}

void copy_async_commit() {
  for (const Copy& copy : current->open) current->committed.push_back(copy);
  current->open.clear();
}

void copy_async_wait() {
  for (const Copy& copy : current->committed) {
    if (copy.inside) std::memcpy(copy.shared, copy.global, 16);
    if (!copy.inside) std::memset(copy.shared, 0, 16);
  }
  current->committed.clear();
}

void begin_launch(dim3 grid, int threads, int shared_bytes) {
  grid_size = grid, block_size = dim3(static_cast<unsigned>(threads));
  shared_bytes_of_block.assign(static_cast<size_t>(shared_bytes) + 16, 0);
  void* start = shared_bytes_of_block.data();
  size_t room = shared_bytes_of_block.size();
  dynamic_shared_memory = static_cast<char*>(std::align(16, static_cast<size_t>(shared_bytes), start, room));
  if (threads % kWarp != 0) fail("a block that is no multiple of a warp");
  if (static_cast<int>(fibers.size()) < threads) {
    fibers.clear();
    fibers.resize(static_cast<size_t>(threads));
  }
}

void run_block(const std::function<void()>& thread, int threads) {
  body = &thread;
  std::memset(shared_bytes_of_block.data(), 0xff, shared_bytes_of_block.size());
  std::vector<int> warps;
  for (int index = 0; index < threads; ++index) {
    Fiber& fiber = fibers[index];
    fiber.started = false, fiber.state = State::running;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, fiber_main, 0);
    if (index % kWarp == 0) warps.push_back(index);
  }
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), order);
    for (int first : warps) run_warp(first);
    int done = 0;
    for (int index = 0; index < threads; ++index) done += fibers[index].state == State::done;
    if (done == threads) return;
    if (done != 0) fail("threads ended while others wait at a barrier");
    for (int index = 0; index < threads; ++index) fibers[index].state = State::running;
  }
}

}  // namespace emulator

void pyard::cuda::check_row_address(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("ldmatrix from an address that is no multiple of 16");
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
