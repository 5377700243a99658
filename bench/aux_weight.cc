// aux_weight_table [tracking | shift | probe] [--seeds FIRST:LAST]: pi on the auxiliary loss's weight, on the simulated router.
//
// tracking   Against seven fixed weights, from first weights 100 times too high and too low, with its
//            default gains. Balance is the signed excess CV, cost the displacement of the router's preferences from
//            those that the task wants (simulation.h), both averaged over the last 800 of 10000 steps. Its cost is compared with that of the fixed weight which balances as well: a run of the
//            same length at the weight that the seven say balances as pi did, and the slope of the seven for what is
//            left. The same once more over the last 800 of 3000 steps. Preferences come back at the task's pull
//            alone, whose time constant is 1667 steps, so that a run of 3000 still holds what the first weight did
//            to the router. How much of it no policy could have undone is shown by `told`: it knows the weight that is
//            right in the long run and goes there at the rate limit, helped by a proportional term.
//            Whether pi hunts: at each of the last 80 decisions a copy of the router routes 262144 tokens, which tells
//            its excess to a hundredth, whatever pi's windows of 10240 show. A move is one at rest if that error
//            lies within pi's tolerance; an excursion begins where it leaves the band.
// shift      A new domain becomes half of the data after 150 decisions, at several cadences: the longer the cadence,
//            the faster the router answers, counted in decisions. Errors are those of ten decisions' mean excess,
//            relative to the target of 0.3.
// probe      How long a test of the weight itself would have to be. The weight goes up and down by half a unit of its
//            logarithm, with the signs of response_probe.h, each for `stay` steps. The answer looked for is that of a load which
//            changes as long as the weight is in force: the excess CV is regressed on the sum of the signs so far.
//
// Prints Markdown.
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

constexpr std::int64_t kShort = 3000, kLong = 10000, kWindow = 800, kTokens = 1024, kCadence = 10;
constexpr double kRate = 0.5;
constexpr double kTolerance = 0.05;                  // pi's default error_tolerance
constexpr std::int64_t kTrueTokens = 256 * kTokens;  // of the batch that shows the true error

struct Point {
  double excess = 0, cost = 0;
  // Of the window, if asked.
  int decisions = 0, moves = 0;
  int at_rest = 0;     // moves while the true error lies within pi's tolerance
  int outside = 0;     // decisions at which it does not
  int excursions = 0;  // times that it went out
};

enum class Tuner { kFixed, kTold, kPi };

struct Run {
  Tuner tuner = Tuner::kFixed;
  double initial = 0, target = 0;
  double told = 0;  // what kTold knows
  std::uint64_t seed = 1;
  std::int64_t cadence = kCadence;
  std::int64_t shift = 0;  // step at which a new domain becomes half of the data; 0 = never
};

class Loop {
 public:
  explicit Loop(const Run& run) : run_(run), controller_(config_of(run)), router_(plant_of(run)) {
    own_ = run.initial;
  }

  double weight() const { return run_.tuner == Tuner::kTold ? own_ : controller_.aux_loss_weight(0); }
  /// One step; its signed excess, squared.
  double step() {
    controller_.record(0, router_.route(controller_.bias(0), weight()));
    const double seen = signed_excess_cv_sq(*controller_.step().layers[0].metrics).value_or(0);
    sum_ += seen;
    if (++steps_ % run_.cadence == 0) {
      const double error =
          std::copysign(std::sqrt(std::abs(sum_ / static_cast<double>(run_.cadence))), sum_) /
              std::max(run_.target, 1e-9) -
          1;
      const double move = std::log(run_.told / own_) + 3 * std::clamp(error, -1.0, 1.0);
      if (run_.tuner == Tuner::kTold) own_ *= std::exp(std::clamp(move, -kRate, kRate));
      sum_ = 0;
    }
    return seen;
  }
  double cost() const { return router_.displacement(); }
  /// Runs to `end`; figures of the last `window` steps, with its moves and excursions if asked.
  Point run_to(std::int64_t end, std::int64_t window, bool with_moves = false) {
    Point p;
    double square = 0;
    bool was_out = false;
    while (steps_ < end) {
      const double before = weight();
      const double seen = step();
      if (steps_ <= end - window) continue;
      square += seen / static_cast<double>(window);
      p.cost += cost() / static_cast<double>(window);
      if (!with_moves || steps_ % run_.cadence != 0) continue;
      const bool out = std::abs(true_error()) > kTolerance, moved = weight() != before;
      ++p.decisions;
      p.moves += moved;
      p.at_rest += moved && !out;
      p.outside += out;
      p.excursions += out && !was_out;
      was_out = out;
    }
    p.excess = std::copysign(std::sqrt(std::abs(square)), square);
    return p;
  }

 private:
  // Of the router as it is now, relative to the target.
  double true_error() const {
    SimulatedRouter router = router_;
    router.set_tokens(kTrueTokens);
    std::vector<double> counts(static_cast<std::size_t>(router.options().experts));
    for (const std::int64_t expert : router.route(controller_.bias(0)).experts) {
      ++counts[static_cast<std::size_t>(expert)];
    }
    const double experts = static_cast<double>(counts.size()), top_k = router.options().top_k;
    const double mean = top_k * static_cast<double>(kTrueTokens) / experts;
    double square = -(experts / top_k - 1) / static_cast<double>(kTrueTokens);  // the floor's
    for (const double count : counts) square += (count / mean - 1) * (count / mean - 1) / experts;
    return std::copysign(std::sqrt(std::abs(square)), square) / run_.target - 1;
  }
  static SimulationOptions plant_of(const Run& run) {
    SimulationOptions plant;
    plant.seed = run.seed;
    plant.tokens = kTokens;
    if (run.shift > 0) {
      plant.scenario = Scenario::kShift;
      plant.event_step = run.shift;
    }
    return plant;
  }
  static ControllerConfig config_of(const Run& run) {
    const bool pi = run.tuner == Tuner::kPi;
    ControllerConfig config = config_for({"", "fixed", {}}, plant_of(run));
    config.aux_loss_weight.policy = pi ? "pi" : "fixed";
    config.aux_loss_weight.initial = run.initial;
    config.aux_loss_weight.limits = {.min = 1e-6, .max = 10, .rate = kRate, .cadence = run.cadence};
    if (pi) config.aux_loss_weight.options.set("target", run.target);
    return config;
  }

  Run run_;
  Controller controller_;
  SimulatedRouter router_;
  double own_ = 0;  // the weight in force under kTold
  double sum_ = 0;
  std::int64_t steps_ = 0;
};

struct Both {
  Point early, late;  // the last kWindow of kShort and of kLong steps
};

Both run_both(const Run& run) {
  Loop loop(run);
  Both both;
  both.early = loop.run_to(kShort, kWindow);
  both.late = loop.run_to(kLong, kWindow, run.tuner == Tuner::kPi);
  return both;
}

using Window = Point Both::*;
struct Fixed {
  double weight = 0;
  Both both;
};

// Of the seven, by falling excess, the first of the two between which `excess` lies (or that are nearest).
std::size_t segment_of(const std::vector<Fixed>& curve, Window window, double excess) {
  std::size_t i = 0;
  while (i + 2 < curve.size() && (curve[i + 1].both.*window).excess > excess) ++i;
  return i;
}

double weight_for(const std::vector<Fixed>& curve, Window window, double excess) {
  const std::size_t i = segment_of(curve, window, excess);
  const Point &a = curve[i].both.*window, &b = curve[i + 1].both.*window;
  const double part = (excess - a.excess) / (b.excess - a.excess);
  return curve[i].weight * std::pow(curve[i + 1].weight / curve[i].weight, part);
}

// The cost of the fixed weight that balances as well as `wanted` in the same window.
double cost_as_good(const Point& wanted, const std::vector<Fixed>& curve, Window window, std::uint64_t seed) {
  const std::size_t i = segment_of(curve, window, wanted.excess);
  const Point &a = curve[i].both.*window, &b = curve[i + 1].both.*window;
  Loop loop({.initial = weight_for(curve, window, wanted.excess), .seed = seed});
  const Point found = loop.run_to(window == &Both::late ? kLong : kShort, kWindow);
  return found.cost + (wanted.excess - found.excess) * (b.cost - a.cost) / (b.excess - a.excess);
}

const char* name_of(Tuner tuner) {
  switch (tuner) {
    case Tuner::kPi:
      return "pi";
    case Tuner::kTold:
      return "told";
    case Tuner::kFixed:
      break;
  }
  return "fixed";
}

std::vector<Fixed> curve_of(std::uint64_t seed) {
  std::vector<Fixed> curve;
  for (const double weight : {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1}) curve.push_back({weight, {}});
  in_parallel(curve.size(),
              [&](std::size_t i) { curve[i].both = run_both({.initial = curve[i].weight, .seed = seed}); });
  return curve;
}

// Counts over all runs of pi.
struct Total {
  int runs = 0, late_within = 0, early_within = 0, decisions = 0, moves = 0, at_rest = 0, outside = 0,
      excursions = 0;
  void add(double early_ratio, double late_ratio, const Point& late) {
    ++runs;
    early_within += early_ratio <= 1.05;
    late_within += late_ratio <= 1.05;
    decisions += late.decisions;
    moves += late.moves;
    at_rest += late.at_rest;
    outside += late.outside;
    excursions += late.excursions;
  }
};

void tracking(std::uint64_t first, std::uint64_t last) {
  Total total;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const std::vector<Fixed> curve = curve_of(seed);
    std::printf("\n### Seed %d\n\n| weight | excess CV, cost at 3000 | at 10000 |\n|---|---|---|\n",
                static_cast<int>(seed));
    for (const Fixed& f : curve) {
      std::printf("| fixed %g | %.3f, %.4f | %.3f, %.4f |\n", f.weight, f.both.early.excess,
                  f.both.early.cost, f.both.late.excess, f.both.late.cost);
    }
    // First weights are 100 times above and below the one of the seven that is best in the long run.
    struct Trial {
      Run run;
      Both both;
      double early_cost = 0, late_cost = 0;  // of the fixed weight as good
    };
    std::vector<Trial> trials;
    for (const double target : {0.6, 0.3, 0.15}) {
      const auto nearest = *std::min_element(curve.begin(), curve.end(), [&](const Fixed& a, const Fixed& b) {
        return std::abs(a.both.late.excess - target) < std::abs(b.both.late.excess - target);
      });
      for (const Tuner tuner : {Tuner::kTold, Tuner::kPi}) {
        if (tuner == Tuner::kTold && target != 0.6) continue;  // elsewhere nothing is left to explain
        for (const double factor : {0.01, 100.0}) {
          trials.push_back({{.tuner = tuner,
                             .initial = nearest.weight * factor,
                             .target = target,
                             .told = weight_for(curve, &Both::late, target),
                             .seed = seed},
                            {}});
        }
      }
    }
    in_parallel(trials.size(), [&](std::size_t i) {
      Trial& t = trials[i];
      t.both = run_both(t.run);
      t.early_cost = cost_as_good(t.both.early, curve, &Both::early, seed);
      t.late_cost = cost_as_good(t.both.late, curve, &Both::late, seed);
    });
    std::printf(
        "\n| law | target | first weight | excess CV at 3000 | cost | of the fixed weight as good | ratio | "
        "excess CV at 10000 | cost | of the fixed weight as good | ratio | moves | at rest | excursions | "
        "outside |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (const Trial& t : trials) {
      const Point &early = t.both.early, &late = t.both.late;
      const double early_ratio = early.cost / t.early_cost, late_ratio = late.cost / t.late_cost;
      std::printf("| %s | %.2f | %.0e | %.3f | %.4f | %.4f | %.3f | %.3f | %.4f | %.4f | %.3f | ",
                  name_of(t.run.tuner), t.run.target, t.run.initial, early.excess, early.cost, t.early_cost,
                  early_ratio, late.excess, late.cost, t.late_cost, late_ratio);
      if (t.run.tuner == Tuner::kTold) {
        std::printf("| | | |\n");
        continue;
      }
      std::printf("%d | %d | %d | %d |\n", late.moves, late.at_rest, late.excursions, late.outside);
      total.add(early_ratio, late_ratio, late);
    }
  }
  std::printf(
      "\n### All seeds\n\n| runs of pi | within 5 %% of the fixed weight's cost or below, at 10000 | at 3000 "
      "| "
      "last decisions | moves | at rest | excursions | outside |\n|---|---|---|---|---|---|---|---|\n"
      "| %d | %d | %d | %d | %d | %d | %d | %d |\n",
      total.runs, total.late_within, total.early_within, total.decisions, total.moves, total.at_rest,
      total.excursions, total.outside);
}

struct Jolt {
  double mean = 0;  // relative distance of the excess from the target, over the decisions after the shift
  Point rest;       // the decisions after those
};

Jolt jolt_of(Run run) {
  constexpr std::int64_t kBefore = 150, kAfter = 100, kRest = 50;
  run.shift = kBefore * run.cadence;
  Loop loop(run);
  loop.run_to(run.shift, 1);
  Jolt jolt;
  for (std::int64_t ten = 0; ten < kAfter / 10; ++ten) {
    const Point p = loop.run_to(run.shift + (ten + 1) * 10 * run.cadence, 10 * run.cadence);
    jolt.mean += std::abs(p.excess / run.target - 1) * 10 / kAfter;
  }
  jolt.rest = loop.run_to(run.shift + (kAfter + kRest) * run.cadence, kRest * run.cadence, true);
  return jolt;
}

void shift(std::uint64_t first, std::uint64_t last) {
  struct Trial {
    Run run;
    Jolt jolt;
  };
  std::vector<Trial> trials;
  for (const std::int64_t cadence : {3, 10, 30}) {
    for (std::uint64_t seed = first; seed <= last; ++seed) {
      trials.push_back(
          {{.tuner = Tuner::kPi, .initial = 0.003, .target = 0.3, .seed = seed, .cadence = cadence}, {}});
    }
  }
  in_parallel(trials.size(), [&](std::size_t i) { trials[i].jolt = jolt_of(trials[i].run); });
  std::printf(
      "\n| cadence | seed | mean error over 100 decisions after the shift | excess CV of the next 50 | "
      "moves | at rest | outside |\n|---|---|---|---|---|---|---|\n");
  for (const Trial& t : trials) {
    std::printf("| %d | %d | %.3f | %.3f | %d | %d | %d |\n", static_cast<int>(t.run.cadence),
                static_cast<int>(t.run.seed), t.jolt.mean, t.jolt.rest.excess, t.jolt.rest.moves,
                t.jolt.rest.at_rest, t.jolt.rest.outside);
  }
}

// What one block of eight test moves says: the relative change of the excess CV for each unit of the logarithm of the
// weight that was in force for `stay` steps. Mean and standard deviation over blocks.
struct Answer {
  double mean = 0, deviation = 0;
};

Answer answer_of(double weight, int stay, std::uint64_t seed) {
  constexpr double kSigns[] = {1, 1, -1, 1, -1, -1, -1, 1}, kSize = 0.5;
  constexpr int kBlocks = 24, kSettle = 2000;
  SimulationOptions plant;
  plant.seed = seed;
  SimulatedRouter router(plant);
  const ControllerConfig config = config_for({"", "fixed", {}}, plant);
  Controller controller(config);
  const auto excess_over = [&](double in_force, int steps) {
    double square = 0;
    for (int i = 0; i < steps; ++i) {
      controller.record(0, router.route(controller.bias(0), in_force));
      square += signed_excess_cv_sq(*controller.step().layers[0].metrics).value_or(0) / steps;
    }
    return std::sqrt(std::max(0.0, square));
  };
  excess_over(weight, kSettle);
  double sum = 0, squares = 0;
  for (int block = 0; block < kBlocks; ++block) {
    constexpr int kMoves = 8;
    double z[kMoves], y[kMoves], mean_z = 0, mean_y = 0, path = 0;
    for (int i = 0; i < kMoves; ++i) {
      z[i] = path + kSigns[i] / 2;  // in the middle of the stay
      path += kSigns[i];
      y[i] = excess_over(weight * std::exp(kSize * kSigns[i]), stay);
      mean_z += z[i] / kMoves;
      mean_y += y[i] / kMoves;
    }
    // Without a line: the router may drift.
    double zt = 0, yt = 0, tt = 0, zy = 0, zz = 0;
    for (int i = 0; i < kMoves; ++i) {
      const double t = i - (kMoves - 1) / 2.0;
      zt += t * (z[i] - mean_z);
      yt += t * (y[i] - mean_y);
      tt += t * t;
    }
    for (int i = 0; i < kMoves; ++i) {
      const double t = i - (kMoves - 1) / 2.0, without = z[i] - mean_z - zt / tt * t;
      zy += without * (y[i] - mean_y - yt / tt * t);
      zz += without * without;
    }
    const double found = zy / zz / kSize / mean_y;
    sum += found / kBlocks;
    squares += found * found / kBlocks;
  }
  return {sum, std::sqrt(std::max(0.0, squares - sum * sum))};
}

void probe(std::uint64_t first, std::uint64_t last) {
  struct Trial {
    double weight;
    int stay;
    std::uint64_t seed;
    Answer answer;
  };
  std::vector<Trial> trials;
  for (const double weight : {1e-3, 3e-3, 1e-2}) {
    for (const int stay : {5, 40}) {
      for (std::uint64_t seed = first; seed <= last; ++seed) trials.push_back({weight, stay, seed, {}});
    }
  }
  in_parallel(trials.size(), [&](std::size_t i) {
    trials[i].answer = answer_of(trials[i].weight, trials[i].stay, trials[i].seed);
  });
  std::printf(
      "\n| weight | stay, steps | seed | change of the excess CV | its deviation from block to block | steps "
      "until "
      "five standard errors |\n|---|---|---|---|---|---|\n");
  for (const Trial& t : trials) {
    const double blocks = 25 * t.answer.deviation * t.answer.deviation / (t.answer.mean * t.answer.mean);
    std::printf("| %g | %d | %d | %+.4f | %.4f | %.0f |\n", t.weight, t.stay, static_cast<int>(t.seed),
                t.answer.mean, t.answer.deviation, std::max(1.0, blocks) * 8 * t.stay);
  }
}

int main_of(const std::vector<std::string>& arguments) {
  unsigned long long first = 1, last = 1;
  bool wrong = false;
  std::string what = "tracking";
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--seeds" && i + 1 < arguments.size()) {
      wrong = wrong || std::sscanf(arguments[++i].c_str(), "%llu:%llu", &first, &last) != 2 || last < first;
    } else {
      what = arguments[i];
    }
  }
  if (wrong || (what != "tracking" && what != "shift" && what != "probe")) {
    std::fprintf(stderr, "usage: aux_weight_table [tracking | shift | probe] [--seeds FIRST:LAST]\n");
    return 2;
  }
  std::printf("\n## The auxiliary weight: %s, seeds %llu to %llu\n", what.c_str(), first, last);
  (what == "shift" ? shift : what == "probe" ? probe : tracking)(first, last);
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of({argv + 1, argv + argc});
}
