// A program with an Eigen of its own, for the narrowest registers, around a core for the widest that this machine has.
// Eigen's inline functions and its alignment depend on the registers: were one taken for both, one side would break.
#include <Eigen/Core>
#include <cmath>
#include <cstdio>
#include <vector>

#include "moectl/metrics.h"

int main() {
  using Lanes = Eigen::Array<double, 8, 1>;
  static_assert(alignof(Lanes) == 16, "this file is compiled for SSE2");
  const moectl::StatsShape shape{.experts = 19, .top_k = 1, .needs = {}};
  moectl::RoutingStats stats(shape);
  const std::vector<std::int64_t> counts(19, 4);
  stats.add_counts(counts, 76);
  moectl::Metrics metrics;
  moectl::Measurer(shape, {}).measure(stats, metrics);
  const Eigen::VectorXd own = Eigen::VectorXd::LinSpaced(19, 1, 19);
  const Lanes lanes = Lanes::Constant(2).max(Lanes::LinSpaced(0, 7)) * 2.0;
  const bool good = metrics.max_vio == 0 && std::abs(*metrics.entropy - std::log(19.0)) < 1e-12 &&
                    own.sum() == 190 && own.dot(own) == 2470 && lanes.sum() == 62;
  std::printf("max_vio %g, entropy %g, own sums %g and %g\n", *metrics.max_vio, *metrics.entropy, own.sum(),
              lanes.sum());
  return good ? 0 : 1;
}
