#include "plan.h"

#include <algorithm>

namespace fastrnn::cuda {
namespace {

bool has_tensor_cores(const Problem& p, const DeviceInfo& device) {
  return device.capability >= 80 && (p.element() == 2 || (p.dtype == DType::kFloat32 && p.tf32));
}

// Time of a step, roughly, in cycles of one multiprocessor. The rates are those of the hardware's
// documents; what a barrier costs is a guess until it has been measured.
double cost(const Problem& p, const DeviceInfo& device, const Plan& plan, const Layout& l) {
  constexpr double kFromCache = 32, kFromShared = 128;  // bytes a cycle
  const double products = plan.tensor                  ? 2048.0 / static_cast<double>(p.element())
                          : p.dtype == DType::kFloat64 ? 64
                                                       : 128;
  const double bytes = static_cast<double>(l.depth_blocks * kBlockBytes);
  const double depth = bytes / static_cast<double>(p.element());
  const int rows = l.row_parts * std::min(l.rows, Layout::rows_per_warp(plan.tensor));
  double cycles = depth * l.columns * rows / products;
  cycles += bytes * l.rows / (plan.kind == Kind::kCluster ? kFromShared : kFromCache);
  cycles += bytes * l.columns * l.row_parts / kFromShared;
  if (!plan.resident) cycles += bytes * l.columns / kFromCache;
  const int64_t waves = divide_up(l.blocks(p.directions), device.processors);
  const double barrier = plan.kind == Kind::kStep   ? 4000
                         : plan.kind == Kind::kGrid ? 1500
                         : plan.cluster > 1         ? 600
                                                    : 100;
  return cycles * static_cast<double>(waves) + barrier;
}

}  // namespace

bool is_possible(const Problem& p, const DeviceInfo& device, const Plan& plan) {
  if (plan.units < 1 || kThreads % plan.units != 0 || plan.rows < kOctet ||
      plan.rows % kOctet != 0 || plan.units * plan.rows > kThreads * kItems || plan.slices < 1 ||
      plan.slices > kWarps) {
    return false;
  }
  if (plan.tensor && !has_tensor_cores(p, device)) return false;
  if (!plan.tensor && p.element() == 2 && device.capability >= 80) return false;  // not compiled
  const Layout layout(p, plan);
  if (layout.shared > device.shared) return false;
  switch (plan.kind) {
    case Kind::kStep:
      return plan.cluster == 1;
    case Kind::kGrid:
      return plan.cluster == 1 && layout.blocks(p.directions) <= device.processors;
    case Kind::kCluster:
      return (plan.cluster == 1 || (device.capability >= 90 && plan.cluster <= 8)) &&
             plan.cluster * int64_t{plan.units} >= p.hidden;
  }
  return false;
}

std::optional<Plan> make_plan(const Problem& p, const DeviceInfo& device,
                              std::optional<Kind> kind) {
  std::optional<Plan> best;
  double least = 0;
  const auto consider = [&](Plan plan) {
    if (kind && plan.kind != *kind) return;
    // The warps that columns and rows leave idle share the depth.
    plan.slices = 1;
    const Layout whole(p, plan);
    const int64_t idle = kWarps / (whole.row_parts * whole.column_parts);
    plan.slices = static_cast<int>(std::max<int64_t>(1, std::min(idle, whole.depth_blocks)));
    if (!is_possible(p, device, plan)) return;
    const double time = cost(p, device, plan, Layout(p, plan));
    if (best && time >= least) return;
    best = plan;
    least = time;
  };
  const bool tensor = has_tensor_cores(p, device);
  for (int units = 8; units <= 128; units *= 2) {
    for (int rows = kOctet; rows * units <= kThreads * kItems; rows *= 2) {
      if (rows > kOctet && rows / 2 >= p.batch) break;
      consider({Kind::kStep, units, rows, 1, 1, false, tensor});
      for (const bool resident : {true, false}) {
        consider({Kind::kGrid, units, rows, 1, 1, resident, tensor});
        for (int cluster = 1; cluster <= 8; cluster *= 2) {
          if (cluster > 1 && cluster / 2 * int64_t{units} >= p.hidden) break;
          consider({Kind::kCluster, units, rows, 1, cluster, resident, tensor});
        }
      }
    }
  }
  return best;
}

}  // namespace fastrnn::cuda
