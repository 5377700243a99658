// aux_weight_table [--seeds N]: pi on the auxiliary loss's weight against seven fixed weights, on the
// simulated router.
//
// Balance is the signed excess CV, cost the displacement of the router's preferences from those that the task
// wants (simulation.h), both averaged over the last 800 of 3000 steps. pi starts from weights 100 times too
// high and too low, with its default gains and with gains of its own finding (autotune). Its cost is compared
// with that of the fixed weight which balances as well: a run at the weight that the seven say balances as pi
// did, and the slope of the seven for what is left. Prints Markdown.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "closed_loop.h"
#include "moectl/controller.h"

namespace moectl::bench {
namespace {

constexpr std::int64_t kSteps = 3000, kWindow = 800, kTokens = 1024;

struct Point {
  double excess = 0, cost = 0, weight = 0;
  int moves = 0;      // of the weight, in the window
  int reversals = 0;  // moves against the one before, in the window
};

enum class Tuner { kFixed, kGains, kAutotune };

Point run(Tuner tuner, double initial, double target, std::uint64_t seed) {
  SimulationOptions plant;
  plant.seed = seed;
  plant.tokens = kTokens;
  ControllerConfig config = config_for({"", "fixed", {}}, plant);
  config.aux_loss_weight.policy = tuner == Tuner::kFixed ? "fixed" : "pi";
  config.aux_loss_weight.initial = initial;
  config.aux_loss_weight.limits = {.min = 1e-6, .max = 10, .rate = 0.5, .cadence = 10};
  if (tuner != Tuner::kFixed) {
    config.aux_loss_weight.options.set("target", target);
    config.aux_loss_weight.options.set("autotune", tuner == Tuner::kAutotune);
  }
  Controller controller(config);
  SimulatedRouter router(plant);
  Point p;
  double square = 0, before = initial, last_move = 0;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    controller.record(0, router.route(controller.bias(0), controller.aux_loss_weight(0)));
    const StepReport& report = controller.step();
    const double move = controller.aux_loss_weight(0) - before;
    before = controller.aux_loss_weight(0);
    if (step < kSteps - kWindow) continue;
    square += signed_excess_cv_sq(*report.layers[0].metrics).value_or(0) / kWindow;
    p.cost += router.displacement() / kWindow;
    p.weight += before / kWindow;
    if (move != 0) {
      ++p.moves;
      p.reversals += move * last_move < 0;
      last_move = move;
    }
  }
  p.excess = std::copysign(std::sqrt(std::abs(square)), square);
  return p;
}

// Of the seven, by falling excess, the first of the two between which `excess` lies (or that are nearest).
std::size_t segment_of(const std::vector<Point>& curve, double excess) {
  std::size_t i = 0;
  while (i + 2 < curve.size() && curve[i + 1].excess > excess) ++i;
  return i;
}

// The fixed weight that balances as well as `wanted`.
Point as_good(const Point& wanted, const std::vector<Point>& curve, std::uint64_t seed) {
  const std::size_t i = segment_of(curve, wanted.excess);
  const Point &a = curve[i], &b = curve[i + 1];
  const double part = (wanted.excess - a.excess) / (b.excess - a.excess);
  Point found = run(Tuner::kFixed, a.weight * std::pow(b.weight / a.weight, part), 0, seed);
  found.cost += (wanted.excess - found.excess) * (b.cost - a.cost) / (b.excess - a.excess);
  return found;
}

int main_of(int argc, char** argv) {
  int seeds = 1;
  if (argc == 3 && std::string(argv[1]) == "--seeds") {
    seeds = std::max(1, std::atoi(argv[2]));
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: aux_weight_table [--seeds N]\n");
    return 2;
  }
  const std::vector<double> weights = {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1};
  const std::vector<double> targets = {0.6, 0.3, 0.15};
  for (int seed = 1; seed <= seeds; ++seed) {
    const auto s = static_cast<std::uint64_t>(seed);
    std::vector<Point> curve(weights.size());
    in_parallel(weights.size(), [&](std::size_t i) { curve[i] = run(Tuner::kFixed, weights[i], 0, s); });
    std::printf("\n### Seed %d\n\n| weight | excess CV | cost |\n|---|---|---|\n", seed);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      std::printf("| fixed %g | %.3f | %.4f |\n", weights[i], curve[i].excess, curve[i].cost);
    }
    // Where pi should end, from the curve: first weights are 100 times above and below it.
    struct Trial {
      Tuner tuner;
      double target, initial;
      Point point, fixed;
    };
    std::vector<Trial> trials;
    for (double target : targets) {
      std::size_t nearest = 0;
      for (std::size_t i = 0; i < curve.size(); ++i) {
        if (std::abs(curve[i].excess - target) < std::abs(curve[nearest].excess - target)) nearest = i;
      }
      for (const Tuner tuner : {Tuner::kGains, Tuner::kAutotune}) {
        trials.push_back({tuner, target, weights[nearest] / 100, {}, {}});
        trials.push_back({tuner, target, weights[nearest] * 100, {}, {}});
      }
    }
    in_parallel(trials.size(), [&](std::size_t i) {
      trials[i].point = run(trials[i].tuner, trials[i].initial, trials[i].target, s);
      trials[i].fixed = as_good(trials[i].point, curve, s);
    });
    std::printf(
        "\n| pi | target | first weight | excess CV | cost | fixed weight as good | its cost | ratio | "
        "moves, reversals |\n|---|---|---|---|---|---|---|---|---|\n");
    for (const Trial& t : trials) {
      std::printf("| %s | %.2f | %.0e | %.3f | %.4f | %.5f | %.4f | %.3f | %d, %d |\n",
                  t.tuner == Tuner::kGains ? "gains 1, 0.15" : "autotune", t.target, t.initial,
                  t.point.excess, t.point.cost, t.fixed.weight, t.fixed.cost, t.point.cost / t.fixed.cost,
                  t.point.moves, t.point.reversals);
    }
  }
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
