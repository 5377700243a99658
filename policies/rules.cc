// rules: the published red flags of MoE training and the fixes that go with them, as data.
//
//   At every decision, the first rule of the table acts whose conditions have all held for `confirm` consecutive
//   decisions: value ← value · factor of the rule. Then no rule acts for `wait` decisions, so that the router can respond.
//
// The table is kRules, below; `moectl policies rules` prints it with the source of each row. Papers publish fixed
// weights (Switch, arXiv 2101.03961, section 2.2: 0.01) and no thresholds; those come from guides and monitors of
// people who train such models:
//   [A] yxanul/RL, moe_metrics.md, commit 5661d05: 16 experts, top-2; red flags, phases, fixes
//   [B] yxanul/testing_dense, MOE_ROUTER_METRICS_GUIDE.md, commit 0a510c8: 8 experts, top-1; ranges, levers
//   [C] Abineshabee/MoEWatch, docs/config.md, commit 796f956: any number of experts
//   [D] invergent-ai/surogate, surogate/train/moe_monitor.py, commit 5c092f1: any number of experts
//   [E] deepspeedai/DeepSpeedExamples, claude_tutorials/guides/MoE_Tutorial.md, commit de4cf08: troubleshooting
// all on github.com. `confirm` and `wait` are this project's: no source says how long a sign must hold.
//
// The thresholds were published for one N and k. Here they are expressed on scales that transfer to other N and k:
//   entropy < 0.5 ln 16     1/3 of the way from k experts that share all (ln k) to all N (ln N)
//   max_load > 35 %         an expert that 70 % of the tokens choose: 0.7/k, and more than 3 times the mean
//   dead_experts > 4        a quarter of N
// With unequal targets, the entropy on target takes the place of ln N, and the number of experts with a target above 0
// that of N. CV and max_to_mean need no change. Two published signs are left out because others imply them.
// kl_to_uniform > 2 means entropy_normalized < 0.28 at 16 experts, where the entropy's row has acted long before. And a
// CV below 0.2 implies the rest of "weak specialization": KL ≤ ln(1 + CV²) = 0.04, so KL < 0.15, and entropy_normalized
// > 0.95 for 3 experts or more. That rule describes every well-balanced router, so it is off unless `specialize` is on.
//
// Limitations
// - These are rules of thumb from small models. [A] also gives bands, but several of them exclude each other (a CV
//   below 0.6 forces a normalised entropy above 0.89 at 16 experts), so bands are not used here.
// - It acts late and in large steps, and nothing lowers a raised weight again unless `specialize` is on. pi holds a
//   set-point instead of waiting for an alarm.
// - With few tokens per expert, chance alone exceeds a threshold: the noise floor of the CV is √((N/k - 1)/T). A
//   cadence of more steps lowers it.
// - The temperature does not move the load of deterministic top-k routing; only [A] and [B] say that it helps.
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <string_view>

#include "base/format.h"
#include "policies/builtin.h"
#include "policies/choice.h"

namespace moectl::policies {
namespace {

// The unit of a threshold.
enum class Scale {
  kPlain,
  kExperts,       // N
  kTokensChoice,  // 1/k: the load of an expert that every token chooses
  kSpread         // 0: entropy of k experts with all tokens; 1: entropy of an even load
};
struct Condition {
  Metrics::Value Metrics::*metric = nullptr;
  bool above = true;
  double threshold = 0;
  Scale scale = Scale::kPlain;
};
struct Rule {
  std::string_view flag;
  std::int64_t from_step;
  std::array<Condition, 2> all;
  double aux_factor, temperature_factor;
  std::string_view source;  // and the parts of the row that are this project's
  bool specializes = false;
};

constexpr bool kAbove = true, kBelow = false;
// Phases of [A]: early (exploration) to step 1000, mid (specialization emerging) to 5000, late.
constexpr std::int64_t kEarly = 0, kMid = 1000, kAfterForming = 2000;
// The most severe first: if several rows apply, the first one acts.
constexpr std::array<Rule, 9> kRules = {{
    {"collapse",
     kEarly,
     {{{&Metrics::entropy, kBelow, 1.0 / 3, Scale::kSpread}}},
     5,
     1.2,
     "[A] Red Flags: entropy_normalized < 0.5 at 16 experts, top-2; raise weight and temperature. Weight "
     "0.01 to 0.05: [D], [E]; temperature by 0.2 to 0.5: [B]"},
    {"collapse",
     kEarly,
     {{{&Metrics::dead_experts, kAbove, 0.25, Scale::kExperts}}},
     5,
     1.2,
     "[A] Red Flags: dead_experts > 4 out of 16; fix as above"},
    {"collapse",
     kEarly,
     {{{&Metrics::max_load, kAbove, 0.7, Scale::kTokensChoice}, {&Metrics::max_to_mean, kAbove, 3}}},
     5,
     1.2,
     "[A] Red Flags: max_load > 35 % at top-2; fix as above. Ours: the second condition, without which k "
     "near N would always be one"},
    {"likely collapse",
     kEarly,
     {{{&Metrics::load_cv, kAbove, 1.5}}},
     2,
     1.2,
     "[A] 4: load_cv > 1.5; fixes of Red Flags, the weight's by the size of the next row"},
    {"imbalance",
     kEarly,
     {{{&Metrics::load_cv, kAbove, 1}}},
     2,
     1,
     "[A] 4: load_cv > 1; weight 0.01 to 0.02"},
    {"superexpert",
     kEarly,
     {{{&Metrics::max_to_mean, kAbove, 3}}},
     1.5,
     1.1,
     "[C] load_imbalance_warn and [D] imbalance_warn: 3; [A] 5: 20 % of 16 is 3.2, [B] 35 % of 8 is 2.8. "
     "Weight 0.12 to 0.15 or 0.2, temperature by 0.2 or more: [B]"},
    {"dropped tokens",
     kMid,
     {{{&Metrics::drop_rate, kAbove, 0.03}, {&Metrics::load_cv, kAbove, 0.6}}},
     1.5,
     1.1,
     "[A] Healthy Routing: drop_rate < 3 %, and 4: load_cv < 0.6; fix: [B] reduce peaking, sizes as above. "
     "Ours: both together, since drops at a CV within its bound are the capacity's, and that it waits for "
     "mid training"},
    {"severe imbalance",
     kMid,
     {{{&Metrics::load_cv, kAbove, 0.8}}},
     1.5,
     1,
     "[A] 4: load_cv > 0.8; size: [B] 0.12 to 0.15 or 0.2. Ours: that it waits for mid training"},
    {"weak specialization",
     kAfterForming,
     {{{&Metrics::load_cv, kBelow, 0.2}}},
     0.5,
     1,
     "[A] Red Flags: load_cv < 0.2 after 2000 steps; weight 0.01 to 0.005. Only with specialize: true",
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

// `experts`: number of experts with a target above 0. `range`: entropy on target minus ln k.
double threshold_of(const Condition& condition, double experts, double top_k, double range) {
  switch (condition.scale) {
    case Scale::kPlain:
      break;
    case Scale::kExperts:
      return condition.threshold * experts;
    case Scale::kTokensChoice:
      return condition.threshold / top_k;
    case Scale::kSpread:
      // If k experts should receive all tokens, the range is 0 up to rounding, and entropy cannot show a collapse.
      return range > 1e-9 ? std::log(top_k) + condition.threshold * range
                          : -std::numeric_limits<double>::infinity();
  }
  return condition.threshold;
}

class Rules final : public Policy {
 public:
  Rules(const Options& options, const PolicyContext& context)
      : options_(options),
        aux_(context.actuator == Actuator::kAuxLossWeight),
        // With k = N every expert gets every token, which is no fault.
        acts_(context.top_k < context.experts) {
    const double experts = context.experts, top_k = context.top_k;
    scale(experts, top_k, std::log(experts / top_k));
  }

  void propose(const LayerView& layer, std::span<double> value) override {
    if (!acts_) return;
    if (!aimed_) aim(layer);
    if (waiting_ > 0) --waiting_;
    const Metrics& metrics = options_.over_layers == "worst" ? layer.worst : layer.metrics;
    double factor = 1;
    for (std::size_t r = 0; r < kRules.size(); ++r) {
      const Rule& rule = kRules[r];
      const bool applies = layer.step >= rule.from_step && (options_.specialize || !rule.specializes);
      confirmed_[r] = applies && holds(r, metrics) ? confirmed_[r] + 1 : 0;
      if (factor == 1 && waiting_ == 0 && confirmed_[r] >= options_.confirm) {
        factor = aux_ ? rule.aux_factor : rule.temperature_factor;
      }
    }
    if (factor == 1) return;
    value[0] *= factor;
    waiting_ = options_.wait;
    confirmed_.fill(0);
  }

  void exchange(StateIo& io) override {
    io.value("rules.waiting", waiting_);
    io.values("rules.confirmed", confirmed_);
  }

 private:
  void scale(double experts, double top_k, double range) {
    for (std::size_t r = 0; r < kRules.size(); ++r) {
      for (std::size_t c = 0; c < kRules[r].all.size(); ++c) {
        thresholds_[r][c] = threshold_of(kRules[r].all[c], experts, top_k, range);
      }
    }
  }
  // Called once, because targets never change.
  void aim(const LayerView& layer) {
    aimed_ = true;
    const StatsShape& shape = layer.stats.shape();
    const LoadTargets targets(shape.experts, layer.targets);
    if (targets.equal()) return;
    const Metrics wanted =
        metrics_on_target(shape, {.targets = {layer.targets.begin(), layer.targets.end()}});
    scale(targets.wanted(), shape.top_k, *wanted.entropy - std::log(shape.top_k));
  }

  bool holds(std::size_t rule, const Metrics& metrics) const {
    for (std::size_t c = 0; c < kRules[rule].all.size(); ++c) {
      const Condition& condition = kRules[rule].all[c];
      if (condition.metric == nullptr) continue;
      const Metrics::Value value = metrics.*condition.metric;
      if (!value) return false;
      if (condition.above ? !(*value > thresholds_[rule][c]) : !(*value < thresholds_[rule][c])) return false;
    }
    return true;
  }

  Options options_;
  bool aux_, acts_, aimed_ = false;
  std::array<std::array<double, 2>, kRules.size()> thresholds_{};
  std::int64_t waiting_ = 0;
  std::array<std::int64_t, kRules.size()> confirmed_{};
};

std::string_view name_of_metric(Metrics::Value Metrics::*metric) {
  for (const MetricField& field : metric_fields()) {
    if (field.value == metric) return field.name;
  }
  return "";
}

// The table, a rule and its source at a time.
std::string table() {
  std::string text = "rules; the first whose conditions hold acts:\n";
  const auto factor = [](const char* what, double by) {
    return by == 1 ? std::string()
                   : std::string(", ") + what + (by < 1 ? " / " : " x ") + brief(by < 1 ? 1 / by : by, 3);
  };
  for (const Rule& rule : kRules) {
    text += "  " + std::string(rule.flag) + ": ";
    bool first = true;
    for (const Condition& condition : rule.all) {
      if (condition.metric == nullptr) continue;
      if (!first) text += " and ";
      first = false;
      text += std::string(name_of_metric(condition.metric)) + (condition.above ? " > " : " < ");
      switch (condition.scale) {
        case Scale::kPlain:
          text += brief(condition.threshold, 3);
          break;
        case Scale::kExperts:
          text += brief(condition.threshold, 3) + " N";
          break;
        case Scale::kTokensChoice:
          text += brief(condition.threshold, 3) + " / k";
          break;
        case Scale::kSpread:
          text += "ln k + " + brief(condition.threshold, 3) + " ln(N/k)";
          break;
      }
    }
    if (rule.from_step > 0) text += ", from step " + std::to_string(rule.from_step);
    text += factor("weight", rule.aux_factor) + factor("temperature", rule.temperature_factor);
    text += "\n      " + std::string(rule.source) + "\n";
  }
  return text +
         "  on github.com: [A] yxanul/RL moe_metrics.md, [B] yxanul/testing_dense "
         "MOE_ROUTER_METRICS_GUIDE.md,\n"
         "  [C] Abineshabee/MoEWatch docs/config.md, [D] invergent-ai/surogate "
         "surogate/train/moe_monitor.py,\n"
         "  [E] deepspeedai/DeepSpeedExamples claude_tutorials/guides/MoE_Tutorial.md\n";
}

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
      {"confirm", defaults.confirm, "decisions",
       "consecutive decisions for which a rule's conditions must hold", 1},
      {"wait", defaults.wait, "decisions", "pause after a rule has acted", 0},
      choice("over_layers", defaults.over_layers, "for scope: model, the mean over layers or the worst one",
             {"mean", "worst"}),
      {"specialize", defaults.specialize, "",
       "halve the aux weight of a router that is very even after step 2000"},
  };
  d.details = table();
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<Rules>(Options::from(options), context);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
