// Which keys a block of queries sees and which queries see a block of keys, as ranges of tokens cut into tiles. No tile
// crosses from earlier blocks into the own one, so that masks and the bias of earlier blocks are decided once per tile
// and a masked-out tile is never loaded. Compiled for host and device; the tests call it on the host.
#pragma once

#if defined(__CUDACC__)
#define PYARD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYARD_HOST_DEVICE inline
#endif

namespace pyard::cuda {

// In the order of pyard.ops.masks.MASKS: M1, M2, M3, M4 of ARD (arXiv 2504.11295), figure 1b.
enum Mask : int { kDiagonal = 0, kWindow = 1, kAnchor = 2, kCausal = 3 };

// The query blocks are the last `query_steps` of the `key_steps` key blocks.
struct BlockMask {
  int query_steps, key_steps;
  int tokens;  // T, of one block
  int mask;
  int window;  // blocks seen under kWindow, the own one included
};

struct Range {
  int begin, end;
};

// Two disjoint ranges of rows. `other`: earlier keys of a query block, or later queries of a key block.
struct Seen {
  Range other, own;
};

struct Tile {
  int begin, rows;
  bool other;
};

PYARD_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
PYARD_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
PYARD_HOST_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// Rows of k and v that the queries of block `step` (counted among the key blocks) see.
PYARD_HOST_DEVICE Seen seen_keys(const BlockMask& m, int step) {
  int first = step, last = step;
  if (m.mask == kCausal) first = 0;
  if (m.mask == kWindow) first = larger(0, step - m.window + 1);
  if (m.mask == kAnchor && step > 0) first = 0, last = 1;
  return {{first * m.tokens, last * m.tokens}, {step * m.tokens, (step + 1) * m.tokens}};
}

// Rows of q that see the keys of block `step`.
PYARD_HOST_DEVICE Seen seeing_queries(const BlockMask& m, int step) {
  const int offset = m.key_steps - m.query_steps;  // key block of the first query block
  int end = step + 1;
  if (m.mask == kCausal || (m.mask == kAnchor && step == 0)) end = m.key_steps;
  if (m.mask == kWindow) end = m.window < m.key_steps - step ? step + m.window : m.key_steps;
  const int later = larger(step + 1, offset) - offset;
  const int later_end = larger(later, end - offset);
  const int own = larger(0, step - offset);
  const int own_end = step < offset ? own : own + 1;
  return {{later * m.tokens, later_end * m.tokens}, {own * m.tokens, own_end * m.tokens}};
}

// One range where two touch: fewer ragged tiles, for where nothing tells the blocks apart.
PYARD_HOST_DEVICE Seen joined(const Seen& seen) {
  if (seen.other.end == seen.own.begin) return {{0, 0}, {seen.other.begin, seen.own.end}};
  if (seen.own.end == seen.other.begin) return {{0, 0}, {seen.own.begin, seen.other.end}};
  return seen;
}

PYARD_HOST_DEVICE int tile_count(const Seen& seen, int tile_rows) {
  return divide_up(seen.other.end - seen.other.begin, tile_rows) + divide_up(seen.own.end - seen.own.begin, tile_rows);
}

PYARD_HOST_DEVICE Tile tile_at(const Seen& seen, int tile_rows, int index) {
  const int others = divide_up(seen.other.end - seen.other.begin, tile_rows);
  const bool other = index < others;
  const Range range = other ? seen.other : seen.own;
  const int begin = range.begin + (other ? index : index - others) * tile_rows;
  return {begin, smaller(tile_rows, range.end - begin), other};
}

// Tiles of the tensor that a launch is split over: every block of T tokens is cut by itself.
PYARD_HOST_DEVICE int tiles_of_steps(int steps, int tokens, int tile_rows) {
  return steps * divide_up(tokens, tile_rows);
}

}  // namespace pyard::cuda
