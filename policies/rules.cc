// clang-format off
// rules: the published red flags of MoE training and the fixes that go with them, as data.
//
//   at every decision, the first rule of the phase whose conditions all hold for `confirm` decisions in a row acts:
//   value ← value · factor of the rule; then nothing for `wait` decisions, so that the router can answer.
//
//   rule               from  all of                                                           weight  temperature
//   collapse              0  entropy_normalized < 0.5                                         × 2     × 1.1
//   collapse              0  kl_to_uniform > 2                                                × 2     × 1.1
//   collapse              0  load_cv > 1.5                                                    × 2     × 1.1
//   collapse              0  max_load > 0.35                                                  × 2     × 1.1
//   collapse              0  dead_experts > 4                                                 × 2     × 1.1
//   imbalance             0  load_cv > 1                                                      × 2
//   dropped tokens     1000  drop_rate > 0.05                                                 × 1.5
//   severe imbalance   5000  load_cv > 0.8                                                    × 1.5
//   too even           2000  entropy_normalized > 0.95, kl_to_uniform < 0.15, load_cv < 0.2   ÷ 2
//
// Thresholds, the phases' borders (1000, 2000, 5000 steps), doubling the weight at CV 1, and the directions
// of the other fixes (collapse: more weight, more temperature; too even, "weak specialization": less weight)
// are those that training guides for 16 experts, top-2, publish. The sizes of the other fixes are ours, as
// is asking for drops and CV 0.8 only once a router has formed. They are rules of thumb: several of the
// bands that go with them exclude each other (CV below 0.6 forces a normalised entropy above 0.89 at 16
// experts), and "too even" describes every well-balanced router, which is why that rule is off unless
// `specialize` asks for it.
//
// Limitations: thresholds on N = 16 do not carry over to other N unchanged. A rule acts late and in large
// steps; pi holds a set-point instead of waiting for an alarm.
// clang-format on
#include <array>
#include <cmath>

#include "builtin.h"

namespace moectl::policies {
namespace {

struct Condition {
  Metrics::Value Metrics::*metric = nullptr;
  bool above = true;
  double threshold = 0;
};
struct Rule {
  std::int64_t from_step;
  std::array<Condition, 3> all;
  double aux_factor, temperature_factor;
  bool specializes = false;
};

constexpr bool kAbove = true, kBelow = false;
constexpr std::array<Rule, 9> kRules = {{
    {0, {{{&Metrics::entropy_normalized, kBelow, 0.5}}}, 2, 1.1},
    {0, {{{&Metrics::kl_to_uniform, kAbove, 2.0}}}, 2, 1.1},
    {0, {{{&Metrics::load_cv, kAbove, 1.5}}}, 2, 1.1},
    {0, {{{&Metrics::max_load, kAbove, 0.35}}}, 2, 1.1},
    {0, {{{&Metrics::dead_experts, kAbove, 4}}}, 2, 1.1},
    {0, {{{&Metrics::load_cv, kAbove, 1.0}}}, 2, 1},
    {1000, {{{&Metrics::drop_rate, kAbove, 0.05}}}, 1.5, 1},
    {5000, {{{&Metrics::load_cv, kAbove, 0.8}}}, 1.5, 1},
    {2000,
     {{{&Metrics::entropy_normalized, kAbove, 0.95},
       {&Metrics::kl_to_uniform, kBelow, 0.15},
       {&Metrics::load_cv, kBelow, 0.2}}},
     0.5,
     1,
     true},
}};

struct Options {
  std::int64_t confirm = 5;
  std::int64_t wait = 50;
  std::string over_layers = "worst";
  bool specialize = false;

  static Options from(const PolicyOptions& o) {
    return {.confirm = o.integer("confirm"),
            .wait = o.integer("wait"),
            .over_layers = o.text("over_layers"),
            .specialize = o.flag("specialize")};
  }
};

bool holds(const Rule& rule, const Metrics& metrics) {
  for (const Condition& condition : rule.all) {
    if (condition.metric == nullptr) continue;
    const Metrics::Value value = metrics.*condition.metric;
    if (!value) return false;
    if (condition.above ? !(*value > condition.threshold) : !(*value < condition.threshold)) return false;
  }
  return true;
}

class Rules final : public Policy {
 public:
  Rules(const Options& options, Actuator actuator) : options_(options), actuator_(actuator) {}

  void propose(const LayerView& layer, std::span<double> value) override {
    if (waiting_ > 0) --waiting_;
    const Metrics& metrics = options_.over_layers == "worst" ? layer.worst : layer.metrics;
    double factor = 1;
    for (std::size_t r = 0; r < kRules.size(); ++r) {
      const Rule& rule = kRules[r];
      const bool applies = layer.step >= rule.from_step && (options_.specialize || !rule.specializes);
      confirmed_[r] = applies && holds(rule, metrics) ? confirmed_[r] + 1 : 0;
      if (factor == 1 && waiting_ == 0 && confirmed_[r] >= options_.confirm) {
        factor = actuator_ == Actuator::kAuxLossWeight ? rule.aux_factor : rule.temperature_factor;
      }
    }
    if (factor == 1) return;
    value[0] *= factor;
    waiting_ = options_.wait;
    confirmed_.fill(0);
  }

  void save(StateWriter& out) const override {
    out.put("rules_waiting", waiting_);
    out.put("rules_confirmed", confirmed_);
  }
  void load(StateReader& in) override {
    waiting_ = in.get_int("rules_waiting");
    in.get("rules_confirmed", confirmed_);
  }

 private:
  Options options_;
  Actuator actuator_;
  std::int64_t waiting_ = 0;
  std::array<std::int64_t, kRules.size()> confirmed_{};
};

std::string check(const PolicyContext& context, const PolicyOptions&) {
  return context.initial > 0 ? "" : "initial: must be above 0: moves are ratios";
}

}  // namespace

PolicyDescription rules() {
  const Options defaults;
  PolicyDescription d;
  d.name = "rules";
  d.summary = "the published red flags and their fixes, by phase of training";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = {
      {.name = "confirm",
       .default_value = defaults.confirm,
       .unit = "decisions",
       .description = "in a row for which a rule's conditions must hold",
       .min = 1},
      {.name = "wait",
       .default_value = defaults.wait,
       .unit = "decisions",
       .description = "without a rule after one has acted",
       .min = 0},
      {.name = "over_layers",
       .default_value = defaults.over_layers,
       .unit = "",
       .description = "for scope: model, the mean over layers or the worst one",
       .choices = {"mean", "worst"}},
      {.name = "specialize",
       .default_value = defaults.specialize,
       .unit = "",
       .description = "lower the aux weight of a router that is very even after step 2000"},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<Rules>(Options::from(options), context.actuator);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
