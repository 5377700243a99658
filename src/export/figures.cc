#include "moectl/figures.h"
#include "export/step_sample.h"
#include "moectl/health.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace moectl {
namespace {

constexpr std::size_t kWindow = 100;       // steps of the steady window and of the excess area
constexpr std::size_t kMedian = 5;         // steps of the median that settling looks at
constexpr std::size_t kSettledSteps = 20;  // for which it must stay

/// Weighted by tokens: a step of one token counts for little. Where no step knows its tokens all weigh the same, and so
/// they do where steps are counted (settle, excess_area).
template <typename Get>
std::optional<double> mean(std::span<const StepFigures> steps, Get get, bool by_tokens = true) {
  const bool known = by_tokens && std::any_of(steps.begin(), steps.end(),
                                              [&](const auto& s) { return get(s) && s.tokens > 0; });
  double sum = 0, weights = 0;
  for (const StepFigures& step : steps) {
    if (const std::optional<double> value = get(step)) {
      const double weight = known ? static_cast<double>(step.tokens) : 1;
      sum += weight * *value;
      weights += weight;
    }
  }
  return weights > 0 ? std::optional(sum / weights) : std::nullopt;
}

std::span<const StepFigures> last(std::span<const StepFigures> steps) {
  return steps.subspan(steps.size() - std::min(steps.size(), kWindow));
}

std::optional<double> ratio(std::optional<double> value, std::optional<double> floor) {
  if (!value || !floor || !(*floor > 0)) return std::nullopt;
  return *value / *floor;
}

std::optional<std::int64_t> find_settle(std::span<const StepFigures> steps, double threshold) {
  std::size_t settled = 0;
  for (std::size_t i = kMedian - 1; i < steps.size(); ++i) {
    std::array<double, kMedian> window{};
    bool known = true;
    for (std::size_t j = 0; j < kMedian; ++j) {
      const auto& value = steps[i - j].max_vio;
      known = known && value;
      window[j] = value.value_or(0);
    }
    std::nth_element(window.begin(), window.begin() + kMedian / 2, window.end());
    // Where routing leaves no choice the floor is 0, and so is MaxVio.
    settled = known && window[kMedian / 2] <= threshold ? settled + 1 : 0;
    if (settled == kSettledSteps) return steps[i + 1 - kSettledSteps].step;
  }
  return std::nullopt;
}

}  // namespace

std::string_view name_of(FloorKind floor) {
  constexpr std::string_view kNames[] = {"", "noise floor", "sampling floor", "mixed floors"};
  return kNames[static_cast<std::size_t>(floor)];
}

FloorKind joined(FloorKind a, FloorKind b) {
  if (a == FloorKind::kNone || a == b) return b;
  return b == FloorKind::kNone ? a : FloorKind::kMixed;
}

bool is_limit(Reason reason) {
  switch (reason) {
    case Reason::kRate:
    case Reason::kRange:
    case Reason::kReach:
    case Reason::kGuard:
    case Reason::kOscillation:
    case Reason::kRollback:
    case Reason::kFallback:
      return true;
    default:
      return false;
  }
}

StepFigures figures_of(const StepReport& report) {
  LayerMean step(report.step);
  for (const LayerReport& layer : report.layers) step.add(sample_of(report, &layer));
  step.add(sample_of(report, nullptr));
  return step.figures();
}

OverFloor over_floor(std::span<const StepFigures> steps) {
  Metrics means;
  means.max_vio = mean(steps, [](const StepFigures& step) { return step.max_vio; });
  means.load_cv = mean(steps, [](const StepFigures& step) { return step.cv; });
  means.noise_floor_max_vio = mean(steps, [](const StepFigures& step) { return step.floor_max_vio; });
  means.noise_floor_cv = mean(steps, [](const StepFigures& step) { return step.floor_cv; });
  OverFloor over = over_floor(means);
  over.sampling =
      std::all_of(steps.begin(), steps.end(), [](const auto& s) { return s.floor == FloorKind::kSampling; });
  return over;
}

Figures compute_figures(std::span<const StepFigures> steps, std::optional<std::int64_t> shift) {
  Figures out;
  out.steps = static_cast<std::int64_t>(steps.size());
  // A shift at the first step or after the last one divides nothing.
  std::size_t cut = steps.size();
  if (shift) {
    const auto at = std::lower_bound(steps.begin(), steps.end(), *shift,
                                     [](const StepFigures& step, std::int64_t s) { return step.step < s; });
    if (at != steps.begin()) cut = static_cast<std::size_t>(at - steps.begin());
  }
  const auto max_vio = [](const StepFigures& step) { return step.max_vio; };
  const auto floor_of_step = [](const StepFigures& step) { return step.floor_max_vio; };
  const std::span<const StepFigures> steady = last(steps.first(cut));
  const auto floor = mean(steady, floor_of_step);
  for (const StepFigures& step : steady) out.floor = joined(out.floor, step.floor);
  out.max_vio = mean(steady, max_vio);
  out.max_vio_over_floor = ratio(out.max_vio, floor);
  out.cv = mean(steady, [](const StepFigures& step) { return step.cv; });
  out.cv_over_floor = ratio(out.cv, mean(steady, [](const StepFigures& step) { return step.floor_cv; }));
  if (const auto square = mean(steady, [](const StepFigures& step) { return step.excess_cv_sq; })) {
    out.excess_cv = std::copysign(std::sqrt(std::abs(*square)), *square);
  }
  out.dead_experts =
      mean(last(steps), [](const StepFigures& step) { return std::optional(step.dead_experts); });
  out.drop_rate = mean(last(steps), [](const StepFigures& step) { return step.drop_rate; });
  if (const auto each = mean(steady, floor_of_step, false)) {
    out.settle = find_settle(steps, kBalancedFloors * *each);
  }
  if (cut < steps.size()) {
    if (const auto level = mean(last(steps), max_vio, false)) {
      double area = 0;
      for (const StepFigures& step : steps.subspan(cut, std::min(kWindow, steps.size() - cut))) {
        if (step.max_vio) area += std::max(0.0, *step.max_vio - *level);
      }
      out.excess_area = area;
      out.end_over_floor = ratio(mean(last(steps), max_vio), mean(last(steps), floor_of_step));
    }
  }
  for (const StepFigures& step : steps) out.limit_hits += step.limit_hits;
  std::vector<StepFigures> with_loss;
  for (std::size_t i = steps.size(); i-- > 0 && with_loss.size() < kWindow;) {
    if (steps[i].loss) with_loss.push_back(steps[i]);
  }
  out.loss = mean(with_loss, [](const StepFigures& step) { return step.loss; });
  return out;
}

std::vector<std::pair<std::string, std::optional<double>>> fields_of(const Figures& figures) {
  const auto whole = [](std::optional<std::int64_t> value) {
    return value ? std::optional(static_cast<double>(*value)) : std::nullopt;
  };
  return {{"steps", whole(figures.steps)},
          {"settle", whole(figures.settle)},
          {"max_vio", figures.max_vio},
          {"max_vio_over_floor", figures.max_vio_over_floor},
          {"max_vio_global", figures.max_vio_global},
          {"cv", figures.cv},
          {"cv_over_floor", figures.cv_over_floor},
          {"excess_cv", figures.excess_cv},
          {"excess_area", figures.excess_area},
          {"end_over_floor", figures.end_over_floor},
          {"dead_experts", figures.dead_experts},
          {"drop_rate", figures.drop_rate},
          {"limit_hits", whole(figures.limit_hits)},
          {"loss", figures.loss},
          {"validation_loss", figures.validation_loss}};
}

}  // namespace moectl
