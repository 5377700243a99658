#include "simulation/fit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "simulation/simulation_options.h"

namespace moectl {
namespace {

// What is simulated for one set of options. Moments differ between layers, which draw their affinities, and between seeds,
// which draw the weights of clusters, far more than between steps: few steps of many layers.
constexpr int kLayers = 4, kSeeds = 4;
constexpr std::int64_t kSteps = 6, kWarmUp = 20, kMostTokens = 2048;
// Of the design effect: how much the draw of the clusters' weights, which all layers of a run share, moves it (standard
// deviation over it, seeds 1 to 4 and 7: 0.09).
constexpr double kBetweenSeeds = 0.1;
constexpr double kSure = 1.96;  // standard errors of a 95 % interval
// A difference of misfits that may be chance.
constexpr double kSameMisfit = 0.05;
constexpr double kAbsent = 10;  // misfit of a moment that the simulated router does not show
// Below this excess of the summed counts a trace counts as balanced.
constexpr double kBalancedCv = 0.15;
constexpr double kMixtureNoise = 1.1;  // step variance up to this counts as chance

/// An option that moves a moment upwards.
struct Knob {
  double SimulationOptions::*option;
  double low, high;
  std::optional<double> TraceMoments::*moment;
};
constexpr Knob kPreference{&SimulationOptions::preference, 0.05, 8, &TraceMoments::static_cv};
constexpr Knob kMixture{&SimulationOptions::mixture_spread, 0, 2, &TraceMoments::step_variance};

TraceMoments simulated_moments(const SimulationOptions& options, bool balanced) {
  ControllerConfig config;
  config.model = simulated::model_of(options);
  config.collect = {.gap = true, .sequences = options.sequence_length > 0, .probabilities = true};
  if (balanced) config.expert_bias.policy = "adaptive_bias";
  MomentSums sums;
  SimulationOptions one = options;
  for (int s = 0; s < kSeeds; ++s, ++one.seed) {
    Controller controller(config);
    simulate(controller, one, balanced ? kWarmUp + kSteps : kSteps, [&](const StepReport& report) {
      if (balanced && report.step < kWarmUp) return;
      for (const LayerReport& layer : report.layers) sums.add(s * kLayers + layer.layer, *layer.stats);
    });
  }
  return sums.moments();
}

}  // namespace

void MomentSums::add(int layer, const RoutingStats& stats) {
  if (stats.tokens() <= 0 || stats.assignments() <= 0) return;
  if (experts_ == 0) experts_ = stats.experts(), top_k_ = stats.top_k();
  if (experts_ != stats.experts() || top_k_ != stats.top_k()) {
    throw std::invalid_argument("layer " + std::to_string(layer) +
                                ": layers of different experts or top_k cannot be fitted together");
  }
  const Metrics m = measure(stats);
  const FloorInForce floor = floor_of(m);
  if (!m.load_cv || !floor.cv) return;
  Layer& of = layers_[layer];
  of.counts.resize(static_cast<std::size_t>(experts_));
  for (std::size_t i = 0; i < of.counts.size(); ++i) of.counts[i] += static_cast<double>(stats.counts()[i]);
  of.assignments += static_cast<double>(stats.assignments());
  of.steps += 1;
  of.cv_sq += *m.load_cv * *m.load_cv;
  of.floor_sq += *floor.cv * *floor.cv;
  of.tokens += static_cast<double>(stats.tokens());
  if (m.sampling_floor_cv && m.noise_floor_cv) {
    // An uneven load scatters less, over N experts, than an even one: by as much as Σ p² exceeds 1/N.
    const double even = 1.0 / stats.mean_choices() - 1.0 / experts_;
    const double own = even - *m.load_cv * *m.load_cv / experts_;
    if (own > 0) {
      of.ratio +=
          *m.sampling_floor_cv * *m.sampling_floor_cv / (*m.noise_floor_cv * *m.noise_floor_cv * own / even);
      of.ratios += 1;
    }
    of.sequences += static_cast<double>(stats.scalar(RoutingStats::kSequences));
  }
  if (const auto gap = stats.mean_gap()) {
    of.gap += *gap;
    of.gaps += 1;
    const double width =
        from_fixed(stats.scalar(RoutingStats::kGapWidthSum)) / static_cast<double>(stats.tokens());
    double near = 0;
    for (const std::int64_t tokens : stats.array(RoutingStats::kGapNear)) near += static_cast<double>(tokens);
    near /= static_cast<double>(stats.tokens());
    if (width > 0 && near > 0 && near < 1) {
      of.near += -std::log1p(-near) / width * *gap;
      of.nears += 1;
    }
  }
  if (m.token_entropy) of.entropy += *m.token_entropy, of.entropies += 1;
}

TraceMoments MomentSums::moments() const {
  TraceMoments out{.layers = static_cast<int>(layers_.size()), .experts = experts_, .top_k = top_k_};
  double static_sq = 0, step_variance = 0, floor_sq = 0, ratio = 0, gap = 0, entropy = 0, tokens = 0,
         length = 0;
  double with_ratio = 0, with_gap = 0, with_entropy = 0, with_variance = 0, near = 0, with_near = 0,
         ratio_sq = 0;
  const double n = experts_;
  for (const auto& [number, layer] : layers_) {
    double square = 0;
    for (const double count : layer.counts) {
      const double off = n * count / layer.assignments - 1;
      square += off * off / n;
    }
    const double floor = layer.floor_sq / layer.steps;
    // Counts summed over S steps scatter by 1/S of the floor's square.
    static_sq += square - floor / layer.steps;
    floor_sq += floor;
    if (layer.steps > 1) {
      step_variance += (layer.cv_sq / layer.steps - square) / (1 - 1 / layer.steps) / floor;
      with_variance += 1;
    }
    if (layer.ratios > 0) {
      ratio += layer.ratio / layer.ratios;
      ratio_sq += layer.ratio / layer.ratios * (layer.ratio / layer.ratios);
      length += layer.tokens / layer.sequences;
      with_ratio += 1;
    }
    if (layer.gaps > 0) gap += layer.gap / layer.gaps, with_gap += 1;
    if (layer.nears > 0) near += layer.near / layer.nears, with_near += 1;
    if (layer.entropies > 0) entropy += layer.entropy / layer.entropies, with_entropy += 1;
    tokens += layer.tokens / layer.steps;
    out.steps = std::max(out.steps, static_cast<std::int64_t>(layer.steps));
  }
  const auto count = static_cast<double>(layers_.size());
  if (count == 0) return out;
  out.tokens = std::max<std::int64_t>(1, std::llround(tokens / count));
  out.static_cv = std::sqrt(std::max(0.0, static_sq / count));
  out.floor_cv = std::sqrt(floor_sq / count);
  if (with_variance > 0) out.step_variance = step_variance / with_variance;
  if (with_ratio > 0) {
    const double mean = ratio / with_ratio, variance = std::max(0.0, ratio_sq / with_ratio - mean * mean);
    out.design_effect = mean;
    out.design_effect_error = with_ratio > 1 ? std::sqrt(variance / (with_ratio - 1)) : mean / 2;
    out.sequence_length = std::max<std::int64_t>(1, std::llround(length / with_ratio));
  }
  if (with_gap > 0) out.gap = gap / with_gap;
  if (with_near > 0) out.near = near / with_near;
  if (with_entropy > 0) out.token_entropy = entropy / with_entropy;
  return out;
}

SimulationFit fit_simulation(const TraceMoments& trace, const SimulationOptions& start) {
  if (trace.layers == 0) throw std::invalid_argument("trace: no record with tokens and a floor");
  SimulationFit fit;
  fit.options = start;
  fit.options.experts = trace.experts;
  fit.options.top_k = trace.top_k;
  fit.options.sequence_length = trace.design_effect ? trace.sequence_length : 0;
  fit.balanced = *trace.static_cv < kBalancedCv;
  SimulationOptions trial = fit.options;
  trial.layers = kLayers;
  trial.forming = 0;  // what is fitted is the router that the trace ends with
  trial.scenario = Scenario::kSteady;
  trial.delay = 0;
  trial.targets.clear();
  const std::int64_t unit = std::max<std::int64_t>(1, trial.sequence_length);
  // At least two sequences, and a whole number of them.
  trial.tokens = std::max<std::int64_t>(2, std::min(trace.tokens, kMostTokens) / unit) * unit;

  const auto moments_of = [&](const SimulationOptions& options) {
    return simulated_moments(options, fit.balanced);
  };
  const bool spread_told = trace.gap || trace.token_entropy;
  if (!spread_told) fit.untold.emplace_back("token_spread: the trace has neither gaps nor probabilities");
  if (!trace.design_effect) fit.untold.emplace_back("coherence: the trace has no sums by sequence");
  if (!trace.step_variance) fit.untold.emplace_back("mixture_spread: the trace has one step");
  if (fit.balanced) fit.untold.emplace_back("preference: the trace is balanced");

  // Two tokens of a sequence are of one of its clusters with probability coherence²/3, so the design effect is linear in
  // the square of the coherence: its values at 0 and 1 give the coherence for a spread, and what is left is the spread's
  // misfit. Gaps are widest at a spread between: under a sigmoid both narrow and wide spreads have small ones.
  struct Try {
    double spread = 0, coherence = 0, misfit = 0, coherence_from = 0, coherence_to = 1;
  };
  const auto try_spread = [&](double spread) {
    SimulationOptions one = trial;
    one.token_spread = spread;
    Try out{spread, trial.coherence, 0, 0, 1};
    one.coherence = 0;
    const TraceMoments apart = moments_of(one);
    TraceMoments alike = apart;
    if (trace.design_effect) {
      one.coherence = 1;
      alike = moments_of(one);
    }
    const auto miss = [&](const std::optional<double>& of_trace, double found) {
      if (of_trace) out.misfit += std::pow(std::log(found / *of_trace), 2);
    };
    if (trace.design_effect && apart.design_effect && alike.design_effect) {
      const double low = *apart.design_effect, high = *alike.design_effect;
      const auto square_at = [&](double effect) {
        return high > low ? std::clamp((effect - low) / (high - low), 0.0, 1.0) : 0;
      };
      const double square = square_at(*trace.design_effect);
      out.coherence = std::sqrt(square);
      const double error =
          kSure * std::hypot(trace.design_effect_error, kBetweenSeeds * *trace.design_effect);
      out.coherence_from = std::sqrt(square_at(*trace.design_effect - error));
      out.coherence_to = std::sqrt(square_at(*trace.design_effect + error));
      miss(trace.design_effect, low + square * (high - low));
    }
    const auto both = [&](std::optional<double> TraceMoments::*moment) {
      // Such a router shows none: it is not the one sought.
      if (!(trace.*moment)) return;
      if (!(apart.*moment) || !(alike.*moment)) {
        out.misfit += kAbsent;
        return;
      }
      miss(trace.*moment, (*(apart.*moment) + *(alike.*moment)) / 2);
    };
    both(&TraceMoments::gap);
    both(&TraceMoments::near);
    both(&TraceMoments::token_entropy);
    return out;
  };
  Try best{trial.token_spread, trial.coherence, 0, 0, 1};
  const auto search = [&](double low, double high, int points) {
    best.misfit = std::numeric_limits<double>::infinity();
    for (int p = 0; p < points; ++p) {
      const Try one = try_spread(low * std::pow(high / low, p / std::max(1.0, points - 1.0)));
      if (one.misfit < best.misfit) best = one;
    }
    trial.token_spread = best.spread;
    trial.coherence = best.coherence;
  };
  const auto bisect = [&](const Knob& knob, int halvings) {
    const bool by_ratio = knob.low > 0;
    double low = by_ratio ? std::log(knob.low) : knob.low, high = by_ratio ? std::log(knob.high) : knob.high;
    const auto value_at = [&](double x) { return by_ratio ? std::exp(x) : x; };
    for (int h = 0; h < halvings; ++h) {
      trial.*knob.option = value_at((low + high) / 2);
      const std::optional<double> found = moments_of(trial).*knob.moment;
      (found && *found < *(trace.*knob.moment) ? low : high) = (low + high) / 2;
    }
    trial.*knob.option = value_at((low + high) / 2);
  };
  trial.mixture_spread = 0;
  double width = 1.6;  // of the first grid's steps
  for (int round = 0; round < 3; ++round) {
    if (!spread_told) {
      search(trial.token_spread, trial.token_spread, 1);
    } else if (round == 0) {
      search(0.12, 6, 8);
    } else {
      search(trial.token_spread / width, trial.token_spread * width, 4);
      width = std::sqrt(width);
    }
    if (!fit.balanced) bisect(kPreference, 5);
    if (trace.step_variance && *trace.step_variance > kMixtureNoise) bisect(kMixture, 5);
  }
  const bool mixture_moves = trace.step_variance && *trace.step_variance > kMixtureNoise;
  const auto compare = [&](const SimulationOptions& options, std::vector<SimulationFit::Moment>& moments) {
    const TraceMoments found = moments_of(options);
    moments.clear();
    double sum = 0, judged = 0;
    const auto one = [&](const char* name, std::optional<double> of_trace, std::optional<double> of_router,
                         bool counts = true) {
      if (!of_trace || !of_router || !(*of_trace > 0) || !(*of_router > 0)) return;
      moments.push_back({name, *of_trace, *of_router});
      if (!counts) return;
      sum += std::pow(std::log(*of_router / *of_trace), 2);
      judged += 1;
    };
    one("gap", trace.gap, found.gap);
    one("gaps near 0", trace.near, found.near);
    one("token entropy", trace.token_entropy, found.token_entropy);
    one("design effect", trace.design_effect, found.design_effect);
    // Of a mixture that does not move, a few steps tell nothing but noise.
    one("step variance", trace.step_variance, found.step_variance, mixture_moves);
    if (!fit.balanced) one("summed CV", trace.static_cv, found.static_cv);
    // A floor falls with the root of the tokens; no more than kMostTokens are simulated.
    const double scale = std::sqrt(static_cast<double>(options.tokens) / static_cast<double>(trace.tokens));
    one("floor", trace.floor_cv, found.floor_cv ? std::optional(*found.floor_cv * scale) : std::nullopt);
    return judged > 0 ? std::sqrt(sum / judged) : 0;
  };
  // The clusters stay what they were unless others fit better by more than chance.
  fit.misfit = compare(trial, fit.moments);
  std::vector<std::pair<int, double>> by_clusters = {{trial.clusters, fit.misfit}};
  const double own = fit.misfit;
  double least = own;
  std::vector<SimulationFit::Moment> moments;
  for (int clusters = std::max(6, trial.domains); clusters <= 192; clusters *= 2) {
    SimulationOptions one = trial;
    one.clusters = clusters;
    const double misfit = compare(one, moments);
    by_clusters.emplace_back(clusters, misfit);
    least = std::min(least, misfit);
    if (misfit >= own - kSameMisfit || misfit >= fit.misfit) continue;
    fit.misfit = misfit;
    fit.moments = moments;
    fit.options.clusters = clusters;
  }
  fit.clusters_from = fit.clusters_to = fit.options.clusters;
  for (const auto& [clusters, misfit] : by_clusters) {
    if (misfit > least + kSameMisfit) continue;
    fit.clusters_from = std::min(fit.clusters_from, clusters);
    fit.clusters_to = std::max(fit.clusters_to, clusters);
  }
  fit.options.token_spread = trial.token_spread;
  fit.options.coherence = trial.coherence;
  if (trace.design_effect) fit.coherence = {best.coherence_from, best.coherence_to};
  fit.options.preference = trial.preference;
  fit.options.mixture_spread = trial.mixture_spread;
  fit.options.layers = trace.layers;
  fit.options.tokens = std::max<std::int64_t>(1, trace.tokens / unit) * unit;
  return fit;
}

}  // namespace moectl
