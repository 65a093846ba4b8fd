// How a scan is divided among blocks of threads and laid out in memory, for one pass. Plain numbers
// in, plain numbers out: nothing here needs a device, so that all of it is tested without one.
//
// A block owns `units` hidden units, with all their columns of the weight, of `rows` rows of the
// batch, in one direction. Blocks of the same rows and direction, a group, exchange states once per
// step; groups never wait for each other.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "../scan.h"

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__
#else
#define FASTRNN_HD
#endif

namespace fastrnn::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockBytes = 64;  // of one column or row, along the depth of the product
constexpr int kTile = 16;        // columns of a tensor core's product
constexpr int kOctet = 8;        // rows of a tensor core's product, and half a tile of columns
constexpr int kSkew = 4;         // between rows of sums: no two of a warp in one bank

// (row, unit) pairs of a thread, at most: those whose values stay in registers.
FASTRNN_HD constexpr int max_items(int64_t element) { return element == 8 ? 2 : 4; }

// Tiles of columns in one warp at once: those whose sums stay in registers.
FASTRNN_HD constexpr int warp_tiles(int64_t element) { return element == 8 ? 1 : 4; }
FASTRNN_HD constexpr int warp_columns(int columns, int64_t element) {
  const int most = kTile * warp_tiles(element);
  return columns < most ? columns : most;
}

enum class Pass : int { kForward, kBackward };

// What separates a step, which writes states, from the next one, which reads them.
enum class Kind : int {
  kStep,     // the end of a launch: every size
  kGrid,     // flags in global memory; all blocks run at once
  kCluster,  // distributed shared memory of a cluster, or one block alone
};

struct Plan {
  Kind kind;
  int units, rows;  // of a block; rows is a multiple of 8
  int slices;       // of the depth: different warps multiply them
  int cluster;      // blocks of a group, if they are a cluster, else 1
  bool resident;    // the weights of a block stay in its shared memory
  bool tensor;      // tensor cores multiply
  int kept = 0;     // where not all weights stay: those of so many blocks of each slice do
  // In a cluster: a block waits until the bytes of all states have come, which an mbarrier counts,
  // where their sizes allow it; else for the barrier of the cluster.
  bool mbarrier = true;
};

constexpr int kMaxCluster = 16;  // more than 8 where the device grants it

// Of a GPU, or a slice of one, what a plan depends on.
struct DeviceInfo {
  int processors;
  int64_t shared;               // bytes of shared memory a block may have
  int capability;               // 10 * major + minor
  std::array<int, 4> clusters;  // of 2, 4, 8 and 16 blocks that run at once, a block a processor

  // Clusters as sm_90 promises them, of at most 8 blocks, where nobody has asked the device.
  DeviceInfo(int count, int64_t bytes, int version)
      : DeviceInfo(count, bytes, version,
                   version < 90 ? std::array<int, 4>{}
                                : std::array<int, 4>{count / 2, count / 4, count / 8, 0}) {}
  DeviceInfo(int count, int64_t bytes, int version, const std::array<int, 4>& at_once)
      : processors(count), shared(bytes), capability(version), clusters(at_once) {}

  // Of `size` blocks.
  int clusters_at_once(int size) const {
    return size == 1             ? processors
           : size == 2           ? clusters[0]
           : size <= 4           ? clusters[1]
           : size <= 8           ? clusters[2]
           : size <= kMaxCluster ? clusters[3]
                                 : 0;
  }
};

// The recurrence of a layer: `input` and `proj` of the shape are none of its own.
struct Problem : ScanShape {
  Pass pass;
  int gates;  // of the cell, those with rows in W_hh; without any there is no product, and no block
              // waits for another
  int states;  // that the cell carries beside h
  bool tf32;   // float32 may be rounded to it

  // Bytes of an element, and of one in the type that is computed in.
  FASTRNN_HD constexpr int64_t element() const {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }
  FASTRNN_HD constexpr int64_t compute() const { return dtype == DType::kFloat64 ? 8 : 4; }
  // The product of one step: W_hh h, or W_hh^T times the gradients of the gates.
  FASTRNN_HD constexpr int columns_per_unit() const {
    return pass == Pass::kForward || gates == 0 ? gates : 1;
  }
  FASTRNN_HD constexpr int64_t depth() const {
    return pass == Pass::kForward && gates > 0 ? hidden : gates * hidden;
  }
  // The elements that go from step to step beside the product: h and the other states.
  FASTRNN_HD constexpr int64_t carried() const {
    return int64_t{1 + states} * directions * batch * hidden;
  }
};

FASTRNN_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything that follows from a problem and a plan. Offsets and sizes are in bytes, `stride` in
// elements.
struct Layout {
  int units, rows, columns;  // of a block; columns are filled up to whole octets
  int slices, row_parts, column_parts;
  bool resident;
  int kept;
  int64_t unit_tiles, row_tiles;
  int64_t depth_blocks, stride;  // of a row of exchanged states
  bool mbarrier;                 // see Plan
  int64_t packed, exchange, carry, flags, workspace;
  int64_t shared_next, shared_exchange, shared_sums, shared_mbarriers, shared;

  FASTRNN_HD constexpr Layout(const Problem& p, const Plan& plan)
      : units(plan.units),
        rows(plan.rows),
        columns(static_cast<int>(divide_up(p.columns_per_unit() * plan.units, kOctet)) * kOctet),
        slices(plan.slices),
        row_parts(static_cast<int>(divide_up(plan.rows, rows_per_warp(plan.tensor)))),
        column_parts(static_cast<int>(divide_up(columns, kTile * warp_tiles(p.element())))),
        resident(plan.resident),
        kept(plan.kept),
        unit_tiles(plan.kind == Kind::kCluster ? plan.cluster : divide_up(p.hidden, plan.units)),
        row_tiles(divide_up(p.batch, plan.rows)),
        depth_blocks(divide_up(p.depth() * p.element(), kBlockBytes)),
        // An odd number of blocks: eight lanes that read two rows read no bank twice.
        stride((depth_blocks | 1) * kBlockBytes / p.element()),
        // Elements of 16 bits go from block to block in pairs.
        mbarrier(plan.mbarrier && plan.kind == Kind::kCluster && plan.cluster > 1 &&
                 (p.element() > 2 || (plan.units % 2 == 0 && p.hidden % 2 == 0))),
        packed(0),
        exchange(p.directions * unit_tiles * depth_blocks * columns * kBlockBytes),
        carry(exchange + 2 * p.directions * row_tiles * rows * stride * p.element()),
        flags(carry + divide_up(p.carried() * p.compute(), 16) * 16),
        workspace(flags + p.directions * row_tiles * unit_tiles * int64_t{sizeof(int64_t)}),
        shared_next((plan.resident ? depth_blocks : int64_t{slices} * plan.kept) * columns *
                    kBlockBytes),
        shared_exchange(shared_next +
                        (plan.kept == 0 ? 0 : kWarps * next_bytes(columns, p.element()))),
        shared_sums(shared_exchange +
                    (plan.kind == Kind::kCluster ? 2 * rows * stride * p.element() : 0)),
        shared_mbarriers(shared_sums + int64_t{slices} * rows * (columns + kSkew) * p.compute()),
        shared(shared_mbarriers + (mbarrier ? 2 * int64_t{sizeof(uint64_t)} : 0)) {}

  FASTRNN_HD static constexpr int rows_per_warp(bool tensor) {
    return tensor ? 2 * kOctet : kOctet;
  }
  // What a warp has of the weights that do not stay: one block of its columns.
  FASTRNN_HD static constexpr int64_t next_bytes(int columns, int64_t element) {
    return int64_t{warp_columns(columns, element)} * kBlockBytes;
  }
  FASTRNN_HD constexpr int parts() const { return slices * row_parts * column_parts; }
  FASTRNN_HD constexpr int64_t blocks(int directions) const {
    return unit_tiles * row_tiles * directions;
  }
};

// Whether a device can run a problem so.
bool is_possible(const Problem& problem, const DeviceInfo& device, const Plan& plan);

// What a step should take, in cycles of one multiprocessor, by what it spends them on.
struct Terms {
  double states;       // from where others left them
  double product;      // with the weights, from wherever they lie
  double sums;         // of slices, through shared memory
  double cells;        // the dependent operations of a thread's items
  double hand_over;    // to the blocks of the group
  double turns;        // how often all that, as not all blocks run at once
  bool one_hand_over;  // for all turns together

  double cycles() const {
    const double step = states + product + sums + cells;
    return one_hand_over ? step * turns + hand_over : (step + hand_over) * turns;
  }
};
Terms step_terms(const Problem& problem, const DeviceInfo& device, const Plan& plan);

// The plan that should take the least time; of the given kind if there is one, which a size or a
// device may not allow. Clusters with mbarriers or not, see Plan.
std::optional<Plan> make_plan(const Problem& problem, const DeviceInfo& device,
                              std::optional<Kind> kind, bool mbarrier = true);

}  // namespace fastrnn::cuda
