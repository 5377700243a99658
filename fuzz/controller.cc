#include "moectl/controller.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <new>
#include <optional>
#include <vector>

#include "allocation_counter.h"
#include "altered_state.h"
#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl::fuzz {
namespace {

/// Proposes what no policy should, or throws; the same at the same step, so that twins agree.
class Chaos : public Policy {
 public:
  void propose(const LayerView& layer, std::span<double> value) override {
    std::uint64_t hash = static_cast<std::uint64_t>(layer.step * 31 + layer.layer + 7) * 0x9e3779b97f4a7c15;
    if (hash >> 61 == 0) throw std::runtime_error("chaos");
    if (hash >> 61 == 1) throw 17;
    for (double& x : value) {
      hash = (hash ^ (hash >> 29)) * 0xbf58476d1ce4e5b9;
      const double extremes[] = {std::nan(""), HUGE_VAL, -1.7e308, 1.7e308, 0, 5e-324};
      x = hash % 4 == 0 ? extremes[(hash >> 8) % 6]
                        : x + static_cast<double>(static_cast<int>(hash >> 32) % 2000) / 500;
    }
  }
  void on_applied(std::span<const double> applied, const LimitReport& why) override {
    if (why.has(Reason::kRange) && applied.size() > 3) throw std::bad_alloc();
  }
};

const PolicyRegistry& registry() {
  static const PolicyRegistry all = [] {
    PolicyRegistry made;
    register_builtin_policies(made);
    made.add({.name = "chaos",
              .summary = "chaos",
              .actuators = {Actuator::kExpertBias, Actuator::kAuxLossWeight, Actuator::kRouterTemperature},
              .options = {},
              .make = [](const PolicyContext&, const PolicyOptions&) { return std::make_unique<Chaos>(); },
              .check = {}});
    return made;
  }();
  return all;
}

ActuatorConfig drawn_actuator(Choices& choices, Actuator actuator) {
  std::vector<std::string> fitting;
  for (const PolicyDescription* policy : registry().all()) {
    if (std::ranges::count(policy->actuators, actuator) > 0) fitting.push_back(policy->name);
  }
  ActuatorConfig own;
  own.policy = fitting[choices.below(fitting.size())];
  own.limits = default_limits(actuator);
  if (is_multiplicative(actuator)) {
    own.initial = actuator == Actuator::kAuxLossWeight ? 0.01 : 1;
    own.scope = choices.one_of({Scope::kLayer, Scope::kModel});
  }
  if (choices.flag()) {
    own.limits.rate = choices.one_of({1e-3, 0.25, 3.0, 100.0});
    if (!is_multiplicative(actuator)) {
      own.limits.min = -choices.one_of({0.5, 2.0, 1e9, 0.0});
      own.limits.max = choices.one_of({0.5, 2.0, 1e9, 0.0});
      own.limits.center = choices.flag();
    }
    own.limits.deadband = choices.one_of({0.0, 0.0, 1e-3, 10.0});
    own.limits.warmup = choices.byte() % 4;
    own.limits.cadence = choices.between(1, 4);
    own.limits.cooldown = choices.byte() % 3;
  }
  if (own.policy == "adaptive_bias" && choices.flag()) own.options.set("rescue", true);
  if (own.policy == "adaptive_bias" && choices.flag()) own.options.set("feedforward", std::string("tags"));
  if (own.policy == "quantile_bias" && choices.flag()) {
    const bool k3 = choices.flag();
    own.options.set("form", std::string(k3 ? "k3" : "local_mean"));
    if (k3) own.options.set("gain", 1.0);
  }
  if (own.policy == "pi") {
    own.options.set("metric", std::string("load_cv"));
    own.options.set("target", 0.3);
  }
  return own;
}

ControllerConfig drawn_config(Choices& choices) {
  ControllerConfig config;
  config.model.layers = choices.between(1, 3);
  config.model.experts = choices.between(1, 8);
  config.model.top_k =
      1 + static_cast<int>(choices.below(static_cast<std::size_t>(std::min(3, config.model.experts))));
  config.model.delay = choices.one_of({0, 0, 0, 1, 3});
  config.model.score_space = choices.one_of({ScoreSpace::kProbability, ScoreSpace::kLogit});
  if (choices.flag()) config.model.domains = {"a", "b"};
  config.lag = choices.one_of({0, 0, 1});
  config.mode = choices.one_of({Mode::kActive, Mode::kActive, Mode::kActive, Mode::kShadow, Mode::kOff});
  config.monitor.trend_window = choices.between(4, 12);
  config.monitor.trends = choices.flag();
  config.monitor.health.dwell = choices.between(1, 20);
  config.guard.enabled = choices.flag();
  config.guard.warmup = choices.byte() % 8;
  config.guard.confirm = 1 + choices.byte() % 3;
  config.guard.dwell = 1 + choices.byte() % 8;
  config.guard.patience = 1 + choices.byte();
  config.guard.cooldown = choices.byte() % 8;
  config.safety.responsiveness = choices.flag();
  if (choices.flag())
    config.safety.rollback = RollbackOptions{
        .loss_jump = 0.5, .drop_jump = 0.2, .within = 1 + choices.byte() % 6, .cooldown = choices.byte() % 6};
  if (choices.flag()) config.safety.oscillation.emplace();
  config.safety.fallback = choices.one_of({Fallback::kHold, Fallback::kInitial});
  config.safety.fallback_after = choices.byte() % 6;
  const std::uint8_t collected = choices.byte();
  config.collect.gap = collected & 1;
  config.collect.sequences = collected & 2;
  config.collect.probabilities = collected & 4;
  config.collect.margins = collected & 8;
  for (const Actuator actuator : kActuators) config.actuator(actuator) = drawn_actuator(choices, actuator);
  if (choices.below(4) == 0 && config.model.experts > 1) {
    const auto n = static_cast<std::size_t>(config.model.experts);
    config.model.targets.assign(n, 0);
    for (std::size_t i = 1; i < n; ++i) config.model.targets[i] = 1.0 / static_cast<double>(n - 1);
  }
  if (choices.below(3) == 1 && config.model.layers > 1) {
    config.model.targets.clear();
    LayerGroup first, rest;
    first.count = 1;
    rest.count = config.model.layers - 1;
    rest.experts = choices.between(1, 8);
    rest.top_k = 1 + static_cast<int>(choices.below(static_cast<std::size_t>(std::min(3, rest.experts))));
    rest.frozen = choices.below(4) == 3;
    if (choices.flag()) rest.expert_bias = drawn_actuator(choices, Actuator::kExpertBias);
    config.layers = {first, rest};
  }
  return config;
}

/// What one layer routes in a step.
struct Batch {
  std::vector<std::int64_t> experts, domains;
  std::vector<float> top, scores;
  std::int64_t sequence_length = 0;
  std::int64_t dropped = 0;
  bool odd = false, has_dropped = false, has_top = false, has_scores = false, has_probabilities = false,
       has_domains = false;

  RoutingBatch part(std::size_t from, std::size_t to, std::size_t n, std::size_t k) const {
    const auto of = [&](const auto& all, std::size_t width) {
      return std::span(all).subspan(from * width, (to - from) * width);
    };
    RoutingBatch batch{.experts = of(experts, k), .sequence_length = sequence_length};
    if (has_top) batch.top_values = of(top, k + 1);
    if (has_scores) batch.biased_scores = of(scores, n);
    if (has_probabilities) batch.probabilities = of(scores, n);
    if (has_domains) batch.domain_ids = of(domains, 1);
    if (has_dropped) batch.dropped = to * k == experts.size() ? dropped : 0;
    return batch;
  }
};

Batch drawn_batch(Choices& choices, std::size_t n, std::size_t k, const StatsShape& shape) {
  Batch batch;
  const std::uint8_t kind = choices.byte();
  const std::size_t tokens = 2 * choices.below(9);
  const bool odd = batch.odd = kind % 16 == 1;
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::size_t first = kind % 4 == 2 ? 0 : choices.byte() % n;
    for (std::size_t j = 0; j < k; ++j)
      batch.experts.push_back(odd && choices.below(8) == 0 ? choices.integer()
                                                           : static_cast<std::int64_t>((first + j) % n));
    for (std::size_t j = 0; j <= k; ++j)
      batch.top.push_back(odd ? static_cast<float>(choices.number())
                              : 0.75F - 0.125F * static_cast<float>(j));
    for (std::size_t i = 0; i < n; ++i)
      batch.scores.push_back(odd ? static_cast<float>(choices.number())
                                 : 0.125F * static_cast<float>(1 + (t + i + first) % 4));
    batch.domains.push_back(odd ? choices.integer() : static_cast<std::int64_t>(t % 2));
  }
  const std::uint8_t given = choices.byte();
  batch.has_top = k < n && (given & 1) == 0;
  batch.has_scores = batch.has_top && shape.needs.biased_scores() && (given & 2) == 0;
  batch.has_probabilities = shape.needs.probabilities && (given & 4) == 0;
  batch.has_domains = shape.needs.domains > 0 && (given & 8) == 0;
  if (given & 16) batch.sequence_length = 2;
  batch.has_dropped = (given & 32) != 0;
  if (batch.has_dropped) batch.dropped = odd ? choices.integer() : static_cast<std::int64_t>(tokens / 2);
  return batch;
}

/// A few tokens of one layer that are routed by its bias, by none, by its opposite, or by another layer's.
void show_choices(Choices& choices, Controller& twin, Controller& subject) {
  const int layers = twin.config().model.layers;
  const int layer = static_cast<int>(choices.below(static_cast<std::size_t>(layers)));
  const int other = static_cast<int>(choices.below(static_cast<std::size_t>(layers)));
  const double factor = choices.one_of({1.0, 0.0, -1.0});
  const auto n = static_cast<std::size_t>(twin.shape(layer).experts),
             k = static_cast<std::size_t>(twin.shape(layer).top_k);
  const std::span<const double> bias =
      twin.bias(twin.shape(other).experts == twin.shape(layer).experts ? other : layer);
  std::vector<float> scores(n), biased(n);
  std::vector<std::int64_t> order(n);
  for (std::size_t i = 0; i < n; ++i) {
    scores[i] = 0.01F * static_cast<float>(choices.byte());
    biased[i] = scores[i] + static_cast<float>(factor * bias[i]);
    order[i] = static_cast<std::int64_t>(i);
  }
  std::ranges::stable_sort(order, std::greater<>(),
                           [&](std::int64_t i) { return biased[static_cast<std::size_t>(i)]; });
  order.resize(k);
  for (Controller* each : {&twin, &subject})
    each->check_choices(layer, {.experts = order, .biased_scores = biased, .scores = scores});
}

/// The values in force of one layer.
struct Values {
  std::vector<double> bias;
  double weight, temperature;
  friend bool operator==(const Values& a, const Values& b) {
    return a.bias == b.bias && a.weight == b.weight && a.temperature == b.temperature;
  }
};
Values values_of(const Controller& controller, int layer) {
  const auto bias = controller.bias(layer);
  return {{bias.begin(), bias.end()}, controller.aux_loss_weight(layer), controller.temperature(layer)};
}

void require_invariant(Actuator actuator, const Limits& limits, std::span<const double> before,
                       std::span<const double> after, const LimitReport& why, bool adopted, bool may_move) {
  const std::string name(name_of(actuator));
  require(may_move || std::ranges::equal(before, after), name + " moves only in mode active");
  const bool jumps = why.has(Reason::kRollback) || why.has(Reason::kFallback);
  for (std::size_t i = 0; i < after.size(); ++i) {
    require(std::isfinite(after[i]), name + " is finite");
    require(after[i] >= limits.min && after[i] <= limits.max, name + " is within min and max");
    if (jumps || adopted) continue;
    const double move = is_multiplicative(actuator)
                            ? (before[i] == after[i] ? 0 : std::abs(std::log(after[i] / before[i])))
                            : std::abs(after[i] - before[i]);
    const double rounding = is_multiplicative(actuator) ? 1e-14 : 1e-15 * std::abs(before[i]);
    require(move <= limits.rate * (1 + 1e-9) + rounding, name + " moves by at most its rate");
  }
}

/// Makes memory run out at some point of `work`, which must then have changed nothing: tries it again.
template <class Work>
void with_little_memory(int nth, const Work& work) {
  try {
    const moectl::testing::FailingAllocation failing(nth);
    work();
    return;
  } catch (const std::bad_alloc&) {
  }
  work();
}

/// The disturbed controller: what happens to it must not show in what it decides.
class Subject {
 public:
  explicit Subject(const ControllerConfig& config) : config_(config) { make(); }
  Controller& operator*() { return *controller_; }
  Controller* operator->() { return &*controller_; }

  void reload() {
    const std::string state = controller_->save();
    if (size_ == 0) size_ = state.size();
    require(state.size() == size_, "a state has one length");
    make();
    controller_->load(state);
    controller_->hold(held_);
    const std::string differs = moectl::testing::first_difference(controller_->save(), state);
    require(differs.empty(), "a state loads as itself: " + differs);
  }
  void refuse(Choices& choices) {
    const std::string before = controller_->save();
    std::string broken = before;
    char& byte = broken[choices.word() % broken.size()];
    byte = static_cast<char>(byte ^ (1 + choices.byte() % 255));
    try {
      controller_->load(broken);
      require(false, "an altered state is refused");
    } catch (const StateError&) {
    }
    require(controller_->save() == before, "a state that is refused changes nothing");
  }
  void lose_memory(Choices& choices) {
    const int nth = 1 + choices.byte();
    std::string state;
    with_little_memory(nth, [&] { state = controller_->save(); });
    with_little_memory(nth, [&] { controller_->load(state); });
    require(controller_->save() == state, "memory that runs out changes nothing");
  }
  void hold(bool held) {
    held_ = held;
    controller_->hold(held);
  }
  void step(const StepInfo& info, bool failing) {
    if (!failing) {
      controller_->step(info);
      return;
    }
    fails_ = true;
    try {
      controller_->step(info);
    } catch (const ReductionError&) {
    }
    fails_ = false;
  }
  void reduce() {
    reduces_ = true;
    controller_->set_reduction([this](std::span<std::int64_t>) {
      if (fails_) throw std::runtime_error("a rank is gone");
    });
  }

 private:
  void make() {
    controller_.emplace(config_, registry());
    if (reduces_) reduce();
  }
  ControllerConfig config_;
  std::optional<Controller> controller_;
  std::size_t size_ = 0;
  bool held_ = false, reduces_ = false, fails_ = false;
};

}  // namespace

void controller(Bytes bytes) {
  Choices choices(bytes);
  ControllerConfig config = drawn_config(choices);
  try {
    validate(config, registry());
  } catch (const ConfigError& error) {
    require_message(error);
    return;
  }
  Subject subject(config);
  Controller twin(config, registry());
  bool by_record = false;
  for (int layer = 0; layer < config.model.layers; ++layer)
    by_record |= twin.shape(layer).needs.required_local;
  const bool reduces = choices.flag();
  if (reduces) {
    twin.set_reduction([](std::span<std::int64_t>) {});
    subject.reduce();
  }
  // The layers behind the first may be a group of their own.
  const auto actuator_of = [&](int layer, Actuator actuator) -> const ActuatorConfig& {
    const bool own = layer > 0 && !config.layers.empty() && actuator == Actuator::kExpertBias;
    return own && config.layers[1].expert_bias ? *config.layers[1].expert_bias : config.actuator(actuator);
  };
  std::array<std::map<int, bool>, kActuatorCount> adopted;
  int steps = 0;
  for (; steps < 400 && (!choices.done() || steps < 50); ++steps) {
    const std::uint8_t disturbance = choices.byte();
    for (int layer = 0; layer < config.model.layers; ++layer) {
      if (choices.below(16) == 15) continue;
      const auto n = static_cast<std::size_t>(twin.shape(layer).experts),
                 k = static_cast<std::size_t>(twin.shape(layer).top_k);
      const Batch batch = drawn_batch(choices, n, k, twin.shape(layer));
      const std::size_t tokens = batch.experts.size() / k;
      const std::int64_t micro_batch = choices.flag() ? layer : -1;
      const RoutingBatch whole = batch.part(0, tokens, n, k);
      twin.record(layer, whole, micro_batch);
      if (micro_batch >= 0) {  // recomputed
        subject->record(layer, whole, micro_batch);
        subject->record(layer, whole, micro_batch);
      } else if (disturbance % 2 == 0 && !batch.odd && tokens >= 4 && !by_record && disturbance % 16 != 2) {
        // Pieces in another order.
        const std::size_t half = tokens / 4 * 2;
        subject->record(layer, batch.part(half, tokens, n, k));
        subject->record(layer, batch.part(0, half, n, k));
      } else {
        with_little_memory(1 + disturbance / 4, [&] { subject->record(layer, whole); });
      }
    }
    if (choices.below(4) == 3) show_choices(choices, twin, *subject);
    switch (disturbance % 8) {
      case 1:
        subject.reload();
        break;
      case 3:
        subject.refuse(choices);
        break;
      case 5:
        subject.lose_memory(choices);
        break;
      default:
        break;
    }
    switch (choices.below(24)) {
      case 20: {
        const int layer = static_cast<int>(choices.below(static_cast<std::size_t>(config.model.layers)));
        const bool on = choices.flag();
        twin.freeze(layer, on);
        subject->freeze(layer, on);
        break;
      }
      case 21: {
        const bool on = choices.flag();
        twin.hold(on);
        subject.hold(on);
        break;
      }
      case 22: {
        const int layer = static_cast<int>(choices.below(static_cast<std::size_t>(config.model.layers)));
        const Limits& limits = actuator_of(layer, Actuator::kExpertBias).limits;
        std::vector<double> values(static_cast<std::size_t>(twin.shape(layer).experts));
        for (double& value : values)
          value = std::clamp(static_cast<double>(choices.byte()) / 64 - 2, limits.min, limits.max);
        twin.adopt(layer, values);
        subject->adopt(layer, values);
        adopted[0][layer] = true;
        break;
      }
      case 23: {
        const int layer = static_cast<int>(choices.below(static_cast<std::size_t>(config.model.layers)));
        const bool is_weight = choices.flag();
        const Limits& limits = (is_weight ? config.aux_loss_weight : config.router_temperature).limits;
        const double value = std::lerp(limits.min, limits.max, static_cast<double>(choices.byte()) / 255);
        for (Controller* each : {&twin, &*subject})
          is_weight ? each->adopt_aux_loss_weight(layer, value) : each->adopt_temperature(layer, value);
        break;
      }
      default:
        break;
    }
    std::vector<Values> before;
    for (int layer = 0; layer < config.model.layers; ++layer) before.push_back(values_of(twin, layer));
    StepInfo info;
    const std::uint8_t said = choices.byte();
    if (said & 1) info.loss = said & 2 ? choices.number() : 2.5;
    if (said & 4) info.gradient_norm = choices.number();
    info.skipped = said % 32 == 8;
    const std::array<std::int64_t, 2> mixture = {said & 16 ? choices.integer() : 16, 16};
    if (!config.model.domains.empty() && (said & 32)) info.next_mixture = mixture;
    const StepReport& report = twin.step(info);
    subject.step(info, reduces && disturbance % 32 == 6);
    if (subject->steps() != twin.steps()) subject.step(info, false);  // the step whose reduction failed
    require(subject->steps() == twin.steps(), "a step is a step");
    for (int layer = 0; layer < config.model.layers; ++layer) {
      const auto l = static_cast<std::size_t>(layer);
      const Values now = values_of(twin, layer);
      require(values_of(*subject, layer) == now,
              "what disturbs the controller does not show in its decisions");
      const std::span<const double> was[] = {
          before[l].bias, {&before[l].weight, 1}, {&before[l].temperature, 1}};
      const std::span<const double> is[] = {now.bias, {&now.weight, 1}, {&now.temperature, 1}};
      for (std::size_t a = 0; a < kActuatorCount; ++a) {
        const ActuatorConfig& own = actuator_of(layer, kActuators[a]);
        const LimitReport why = report.layers.empty()        ? LimitReport()  // mode off
                                : own.scope == Scope::kModel ? report.model[a].reasons
                                                             : report.layers[l].actuators[a].reasons;
        require_invariant(kActuators[a], own.limits, was[a], is[a], why, adopted[a][layer],
                          config.mode == Mode::kActive);
        if (!std::ranges::equal(was[a], is[a])) adopted[a][layer] = false;
      }
    }
  }
  const std::string shown = moectl::testing::first_difference(subject->save(), twin.save());
  require(shown.empty(), "what disturbs the controller does not show in its state: " + shown);
}

}  // namespace moectl::fuzz
