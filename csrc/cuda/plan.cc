#include "plan.h"

#include <algorithm>
#include <utility>

namespace fastrnn::cuda {
namespace {

bool has_tensor_cores(const Problem& p, const DeviceInfo& device) {
  return device.capability >= 80 && (p.element() == 2 || (p.dtype == DType::kFloat32 && p.tf32));
}

// Time of a step, roughly, in cycles of one multiprocessor. The rates and latencies are those of an
// H100 as documents and others' measurements have them; until ours have been measured, what a plan
// costs is a guess, and only good to compare plans.
Terms terms(const Problem& p, const DeviceInfo& device, const Plan& plan, const Layout& l) {
  constexpr double kFromCache = 32, kFromShared = 128;  // bytes a cycle, while all others read
  constexpr double kCacheLatency = 300, kSharedLatency = 35, kMathLatency = 250;
  constexpr double kRemoteStore = 4;  // of a warp, to the shared memory of another block
  // Of a lane; see blocks_ahead.
  const double loads_ahead = !plan.tensor && l.columns <= 2 * kTile ? 16 : 8;
  const bool in_cluster = plan.kind == Kind::kCluster;
  const double products = plan.tensor                  ? 2048.0 / static_cast<double>(p.element())
                          : p.dtype == DType::kFloat64 ? 64
                                                       : 128;
  const double bytes = static_cast<double>(l.depth_blocks * kBlockBytes);
  const double depth = bytes / static_cast<double>(p.element());
  const int rows = l.row_parts * std::min(l.rows, Layout::rows_per_warp(plan.tensor));
  const double product = depth * l.columns * rows / products;

  // What warps load follows the first load's latency, or is limited by what is under way at once.
  const auto reading = [&](double all, double loads, bool shared) {
    const double latency = shared ? kSharedLatency : kCacheLatency;
    return std::max(latency * (1 + (loads - 1) / loads_ahead),
                    latency + all / (shared ? kFromShared : kFromCache));
  };
  const double turns = static_cast<double>(divide_up(l.parts(), kWarps));
  const double blocks = turns * static_cast<double>(divide_up(l.depth_blocks, l.slices));
  const int own_rows = std::min(l.rows, Layout::rows_per_warp(plan.tensor));
  const double state_loads = blocks * (plan.tensor ? divide_up(own_rows, kOctet) : own_rows);
  const double states = reading(bytes * l.rows * l.column_parts, state_loads, in_cluster);
  const int own_columns = warp_columns(l.columns, p.element());
  const bool in_shared = plan.resident || plan.kept > 0;
  double weights = reading(bytes * l.columns * l.row_parts,
                           blocks * static_cast<double>(divide_up(own_columns, kOctet)), in_shared);
  if (plan.kept > 0) {
    // Each warp copies one block after another; the first has come before the states.
    const double later = blocks - plan.kept - 1;
    const double copied = later * l.parts() * own_columns * kBlockBytes;
    weights = std::max({weights, later * kCacheLatency, kCacheLatency + copied / kFromCache});
  }

  // Every sum of every slice goes through shared memory; the cells of a thread follow one another.
  const double sums = static_cast<double>(l.rows) * l.columns * l.slices * p.compute();
  const double items = static_cast<double>(divide_up(int64_t{l.units} * l.rows, kThreads));
  const double stores = static_cast<double>(divide_up(int64_t{l.units} * l.rows, 32)) *
                        (plan.cluster - 1) * kRemoteStore *
                        (p.pass == Pass::kForward ? 1 : p.gates);
  Terms result{};
  result.states = states;
  result.product = in_shared ? std::max(product, weights) : product + weights;
  result.sums = 2 * sums / kFromShared;
  result.cells = kMathLatency * (1 + items / 4);
  result.hand_over = stores + (plan.kind == Kind::kStep   ? 4000
                               : plan.kind == Kind::kGrid ? 1500
                               : plan.cluster > 1         ? 700
                                                          : 50);
  // Blocks of a step that do not run at once run one after another; so do whole scans of clusters.
  const int64_t all = l.blocks(p.directions);
  result.turns = static_cast<double>(
      in_cluster ? divide_up(all / plan.cluster, device.clusters_at_once(plan.cluster))
                 : divide_up(all, device.processors));
  result.one_hand_over = !in_cluster;
  return result;
}

}  // namespace

bool is_possible(const Problem& p, const DeviceInfo& device, const Plan& plan) {
  if (plan.units < 1 || kThreads % plan.units != 0 || plan.rows < kOctet ||
      plan.rows % kOctet != 0 || plan.units * plan.rows > kThreads * max_items(p.element()) ||
      plan.slices < 1 || plan.slices > kWarps) {
    return false;
  }
  if (plan.tensor && !has_tensor_cores(p, device)) return false;
  if (!plan.tensor && p.element() == 2 && device.capability >= 80) return false;  // not compiled
  const Layout layout(p, plan);
  if (layout.shared > device.shared) return false;
  // A warp that keeps a part of its weights has one part of the product, and some blocks more.
  if (plan.kept < 0 ||
      (plan.kept > 0 && (plan.resident || plan.kind == Kind::kStep || layout.parts() > kWarps ||
                         plan.kept >= layout.depth_blocks / plan.slices))) {
    return false;
  }
  switch (plan.kind) {
    case Kind::kStep:
      return plan.cluster == 1;
    case Kind::kGrid:
      return plan.cluster == 1 &&
             (p.gates == 0 || layout.blocks(p.directions) <= device.processors);
    case Kind::kCluster:
      return plan.cluster >= 1 && p.gates > 0 && device.clusters_at_once(plan.cluster) > 0 &&
             plan.cluster * int64_t{plan.units} >= p.hidden;
  }
  return false;
}

Terms step_terms(const Problem& p, const DeviceInfo& device, const Plan& plan) {
  return terms(p, device, plan, Layout(p, plan));
}

std::optional<Plan> make_plan(const Problem& p, const DeviceInfo& device, std::optional<Kind> kind,
                              bool mbarrier) {
  std::optional<Plan> best;
  double least = 0;
  const auto consider = [&](Plan plan) {
    if (kind && plan.kind != *kind) return;
    plan.mbarrier = mbarrier;
    // The warps that columns and rows leave idle share the depth.
    plan.slices = 1;
    const Layout whole(p, plan);
    const int64_t idle = kWarps / (whole.row_parts * whole.column_parts);
    plan.slices = static_cast<int>(std::max<int64_t>(1, std::min(idle, whole.depth_blocks)));
    if (plan.kept > 0) {  // as much as there is room for
      const Layout one(p, plan);
      const int64_t room = device.shared - one.shared, each = one.shared_next;
      const int64_t most = one.depth_blocks / plan.slices - 1;
      plan.kept = static_cast<int>(std::min(1 + room / each, most));
      if (room < 0 || plan.kept < 1) return;
    }
    if (!is_possible(p, device, plan)) return;
    const double time = terms(p, device, plan, Layout(p, plan)).cycles();
    if (best && time >= least) return;
    best = plan;
    least = time;
  };
  if (p.gates == 0) {  // a thread to each unit of a row
    if (kind == Kind::kCluster) return std::nullopt;
    return Plan{kind.value_or(Kind::kGrid), 32, kOctet, 1, 1, false, has_tensor_cores(p, device)};
  }
  const bool tensor = has_tensor_cores(p, device);
  constexpr std::pair<bool, int> kWhere[] = {{true, 0}, {false, 1}, {false, 0}};
  for (int units = 8; units <= 128; units *= 2) {
    for (int rows = kOctet; rows * units <= kThreads * max_items(p.element()); rows *= 2) {
      if (rows > kOctet && rows / 2 >= p.batch) break;
      consider({Kind::kStep, units, rows, 1, 1, false, tensor});
      for (const auto& [resident, kept] : kWhere) {
        consider({Kind::kGrid, units, rows, 1, 1, resident, tensor, kept});
        for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
          if (cluster > 1 && cluster / 2 * int64_t{units} >= p.hidden) break;
          consider({Kind::kCluster, units, rows, 1, cluster, resident, tensor, kept});
        }
      }
    }
  }
  return best;
}

}  // namespace fastrnn::cuda
