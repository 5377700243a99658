// aux_weight_table [--seeds N]: pi on the auxiliary loss's weight against seven fixed weights, on the
// simulated router.
//
// Balance is the signed excess CV, cost the displacement of the router's preferences from those that the task
// wants (simulation.h), both averaged over the last 1000 of 4000 steps. pi starts from weights 100 times too
// high and too low. Its cost is compared with that of the fixed weight which balances as well: cost over
// balance, interpolated between the seven in logarithms. Prints Markdown.
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

constexpr std::int64_t kSteps = 4000, kWindow = 1000;

struct Point {
  double excess = 0, cost = 0, weight = 0;
  int moves = 0;      // of the weight, in the window
  int reversals = 0;  // moves against the one before, in the window
};

Point run(const std::string& policy, double initial, double target, std::uint64_t seed) {
  SimulationOptions plant;
  plant.seed = seed;
  ControllerConfig config = config_for({"", "fixed", {}}, plant);
  config.aux_loss_weight.policy = policy;
  config.aux_loss_weight.initial = initial;
  config.aux_loss_weight.limits = {.min = 1e-6, .max = 10, .rate = 0.5, .cadence = 10};
  if (policy == "pi") config.aux_loss_weight.options.set("target", target);
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

// The fixed weight that balances as well as `wanted`, by the secant rule on logarithms.
Point as_good(const Point& wanted, std::uint64_t seed) {
  double weight = wanted.weight;
  Point found = run("fixed", weight, 0, seed), other = run("fixed", 1.05 * weight, 0, seed);
  for (int i = 0; i < 2 && other.excess != found.excess; ++i) {
    const double slope = (other.excess - found.excess) / std::log(other.weight / found.weight);
    weight *= std::exp(std::clamp((wanted.excess - found.excess) / slope, -0.5, 0.5));
    other = found;
    found = run("fixed", weight, 0, seed);
  }
  return found;
}

int main_of(int argc, char** argv) {
  int seeds = 3;
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
    in_parallel(weights.size(), [&](std::size_t i) { curve[i] = run("fixed", weights[i], 0, s); });
    std::printf("\n### Seed %d\n\n| weight | excess CV | cost |\n|---|---|---|\n", seed);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      std::printf("| fixed %g | %.3f | %.4f |\n", weights[i], curve[i].excess, curve[i].cost);
    }
    // Where pi should end, from the curve: first weights are 100 times above and below it.
    struct Trial {
      double target, initial;
      Point point, fixed;
    };
    std::vector<Trial> trials;
    for (double target : targets) {
      std::size_t nearest = 0;
      for (std::size_t i = 0; i < curve.size(); ++i) {
        if (std::abs(curve[i].excess - target) < std::abs(curve[nearest].excess - target)) nearest = i;
      }
      trials.push_back({target, weights[nearest] / 100, {}, {}});
      trials.push_back({target, weights[nearest] * 100, {}, {}});
    }
    in_parallel(trials.size(), [&](std::size_t i) {
      trials[i].point = run("pi", trials[i].initial, trials[i].target, s);
      trials[i].fixed = as_good(trials[i].point, s);
    });
    std::printf(
        "\n| pi: target, first weight | excess CV | cost | fixed weight as good: excess, cost | ratio | "
        "weight | "
        "moves, reversals |\n|---|---|---|---|---|---|---|\n");
    for (const Trial& t : trials) {
      std::printf("| %.2f, %.0e | %.3f | %.4f | %.3f, %.4f | %.3f | %.4f | %d, %d |\n", t.target, t.initial,
                  t.point.excess, t.point.cost, t.fixed.excess, t.fixed.cost, t.point.cost / t.fixed.cost,
                  t.point.weight, t.point.moves, t.point.reversals);
    }
  }
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
