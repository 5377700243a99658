#include "moectl/config.h"
#include "moectl/policy.h"
#include "test_paths.h"
#include "test_sums.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <regex>

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Still : Policy {
  void propose(const LayerView&, std::span<double>) override {}
};

/// Policies with every kind of option, so that the tests of the reader do not depend on those that ship.
const PolicyRegistry& registry() {
  static const PolicyRegistry registry = [] {
    const auto make = [](const PolicyContext&, const PolicyOptions&) -> std::unique_ptr<Policy> {
      return std::make_unique<Still>();
    };
    PolicyRegistry r;
    r.add({.name = "fixed",
           .summary = "holds",
           .actuators = {Actuator::kExpertBias, Actuator::kAuxLossWeight, Actuator::kRouterTemperature},
           .options = {},
           .make = make,
           .check = {}});
    r.add({.name = "stepper",
           .summary = "steps",
           .actuators = {Actuator::kExpertBias},
           .options = {{"step", 1e-3, "score", "size", 0.0, 1.0, {}},
                       {"zero_mean_move", true, "", "flag", -1e308, 1e308, {}},
                       {"window", std::int64_t{8}, "steps", "length", 1, 1e308, {}},
                       {"norm", std::string("raw"), "", "which", -1e308, 1e308, {"raw", "mean", "rms"}}},
           .make = make,
           .check = [](const PolicyContext& c, const PolicyOptions& o) -> std::string {
             return o.number("step") > c.max ? "step must be at most limits.max" : "";
           }});
    r.add({.name = "tuner",
           .summary = "tunes",
           .actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature},
           .options = {{"metric", std::string(), "", "what", -1e308, 1e308, {}}},
           .make = make,
           .check = {}});
    return r;
  }();
  return registry;
}

ControllerConfig parse(const std::string& text) {
  return parse_config(text, "c.yaml", registry());
}

const char* const kModel = "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2}\n";

TEST(Config, MinimalTakesEveryDefault) {
  const ControllerConfig c = parse(kModel);
  EXPECT_EQ(c.mode, Mode::kActive);
  EXPECT_EQ(c.lag, 0);
  EXPECT_EQ(c.model.layers, 3);
  EXPECT_EQ(c.model.experts, 16);
  EXPECT_EQ(c.model.top_k, 2);
  EXPECT_EQ(c.model.tokens_per_step, 0);
  EXPECT_EQ(c.expert_bias.policy, "fixed");
  EXPECT_EQ(c.expert_bias.initial, 0);
  EXPECT_EQ(c.aux_loss_weight.initial, 0);
  EXPECT_EQ(c.router_temperature.initial, 1);
  EXPECT_FALSE(c.safety.rollback);
  EXPECT_EQ(c.safety.fallback_after, 50);
  EXPECT_EQ(c.metrics.capacity_factor, 1.25);
  EXPECT_EQ(c.log.every, 1);
}

TEST(Config, ReadsEveryKey) {
  const ControllerConfig c = parse(R"(version: 1
mode: shadow
lag: 1
model:
  layers: 2
  experts: 4
  top_k: 2
  tokens_per_step: 2048
  score_space: logit
  delay: 1
  domains: [prose, "c++"]
  targets: [0.4, 0.3, 0.2, 0.1]
metrics: {capacity_factor: 1.5, cold_fraction: 0.2, dead_fraction: 0.05, dead_after: 7, ema: 0.3, placement: [0, 0, 1, 1]}
expert_bias:
  policy: stepper
  options: {step: 0.125, zero_mean_move: no, window: 3, norm: rms}
  initial: 0.5
  limits: {min: -2, max: 2, rate: .5, center: off, deadband: 1e-4, warmup: 5, cadence: 2, cooldown: 3}
aux_loss_weight:
  policy: tuner
  options: {metric: excess_cv}
  initial: +0.01
  scope: model
  limits: {min: 1.0e-4, max: 0.1, rate: 0.1, cadence: 10}
router_temperature: {policy: fixed, initial: 2}
safety:
  rollback: {loss_jump: 1, drop_jump: 0.5, within: 2, cooldown: 9}
  oscillation: on
  fallback_after: 0
log: {every: 4, per_expert: false, rotate_mb: 1.5, keep: 3}
collect: {gap: true, sequences: true, probabilities: true, gradients: true, losses: true, domain_losses: true,
          latencies: true, margins: true, pairs: true}
)");
  EXPECT_EQ(c.mode, Mode::kShadow);
  EXPECT_EQ(c.lag, 1);
  EXPECT_EQ(c.delay(), 2);
  EXPECT_EQ(c.model.tokens_per_step, 2048);
  EXPECT_EQ(c.model.score_space, ScoreSpace::kLogit);
  EXPECT_EQ(c.model.delay, 1);
  EXPECT_EQ(c.model.domains, (std::vector<std::string>{"prose", "c++"}));
  EXPECT_EQ(c.model.targets, (std::vector<double>{0.4, 0.3, 0.2, 0.1}));
  EXPECT_EQ(c.metrics.capacity_factor, 1.5);
  EXPECT_EQ(c.metrics.cold_fraction, 0.2);
  EXPECT_EQ(c.metrics.placement, (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(c.monitor.dead_fraction, 0.05);
  EXPECT_EQ(c.monitor.dead_after, 7);
  EXPECT_EQ(c.monitor.ema, 0.3);
  EXPECT_EQ(c.expert_bias.options.number("step"), 0.125);
  EXPECT_FALSE(c.expert_bias.options.flag("zero_mean_move"));
  EXPECT_EQ(c.expert_bias.options.integer("window"), 3);
  EXPECT_EQ(c.expert_bias.options.text("norm"), "rms");
  EXPECT_EQ(c.expert_bias.initial, 0.5);
  EXPECT_EQ(c.expert_bias.limits.min, -2);
  EXPECT_EQ(c.expert_bias.limits.max, 2);
  EXPECT_EQ(c.expert_bias.limits.rate, 0.5);
  EXPECT_FALSE(c.expert_bias.limits.center);
  EXPECT_EQ(c.expert_bias.limits.deadband, 1e-4);
  EXPECT_EQ(c.expert_bias.limits.warmup, 5);
  EXPECT_EQ(c.expert_bias.limits.cadence, 2);
  EXPECT_EQ(c.expert_bias.limits.cooldown, 3);
  EXPECT_EQ(c.aux_loss_weight.scope, Scope::kModel);
  EXPECT_EQ(c.aux_loss_weight.initial, 0.01);
  EXPECT_EQ(c.router_temperature.initial, 2);
  ASSERT_TRUE(c.safety.rollback);
  EXPECT_EQ(c.safety.rollback->loss_jump, 1);
  EXPECT_EQ(c.safety.rollback->drop_jump, 0.5);
  EXPECT_EQ(c.safety.rollback->within, 2);
  EXPECT_EQ(c.safety.rollback->cooldown, 9);
  ASSERT_TRUE(c.safety.oscillation);
  EXPECT_EQ(c.safety.oscillation->threshold, OscillationOptions{}.threshold);
  EXPECT_EQ(c.safety.fallback_after, 0);
  EXPECT_EQ(c.log.every, 4);
  EXPECT_FALSE(c.log.per_expert);
  EXPECT_EQ(c.log.rotate_mb, 1.5);
  EXPECT_EQ(c.log.keep, 3);
  const StatsNeeds all = every_input();
  EXPECT_EQ(c.collect, all);
}

TEST(Config, WrittenConfigsReadBackTheSame) {
  const std::vector<std::string> texts = {
      kModel,
      std::string(kModel) +
          "expert_bias: {policy: stepper, options: {step: 0.1, window: 2}}\n"
          "aux_loss_weight: {policy: fixed, initial: 0.3}\n"
          "safety: {rollback: on, oscillation: {threshold: 0.25}}\n",
      "version: 1\nmodel: {layers: 1, experts: 3, top_k: 1, targets: [0.1, 0.2, 0.7], "
      "domains: [\"yes\", \"a: b\", \"\\\"x\\\"\\n\", \"\\u00e9\"]}\n",
  };
  for (const std::string& text : texts) {
    const ControllerConfig c = parse(text);
    const std::string yaml = to_yaml(c);
    const ControllerConfig again = parse(yaml);
    EXPECT_EQ(to_yaml(again), yaml);
    EXPECT_EQ(again.model.domains, c.model.domains);
    EXPECT_EQ(again.model.targets, c.model.targets);
    // JSON is YAML: the header of a run log is a config too.
    EXPECT_EQ(to_yaml(parse(to_json(c))), yaml);
  }
}

TEST(Config, ShippedConfigsReadBackTheSame) {
  int seen = 0;
  for (const auto& entry : std::filesystem::directory_iterator(MOECTL_SOURCE_DIR "/policies")) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    const ControllerConfig c = load_config(entry.path().string());
    EXPECT_EQ(to_yaml(parse_config(to_yaml(c))), to_yaml(c));
    ++seen;
  }
  EXPECT_GT(seen, 0);
}

TEST(Config, RandomNumbersSurviveTheRoundTrip) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-12, -2);
  for (int i = 0; i < 200; ++i) {
    ControllerConfig c = parse(kModel);
    c.expert_bias.limits.rate = std::pow(10, exponent(random));
    c.metrics.capacity_factor = std::pow(10, exponent(random));
    const ControllerConfig again = parse(to_yaml(c));
    EXPECT_EQ(again.expert_bias.limits.rate, c.expert_bias.limits.rate);
    EXPECT_EQ(again.metrics.capacity_factor, c.metrics.capacity_factor);
  }
}

// ---- Wrong configs: the message is asserted whole. ----

struct Wrong {
  const char* name;
  std::string text;
  std::string message;
};

void PrintTo(const Wrong& wrong, std::ostream* out) {
  *out << wrong.name;
}

class WrongConfig : public ::testing::TestWithParam<Wrong> {};

TEST_P(WrongConfig, NamesPlaceKeyValueAndConstraint) {
  try {
    parse(GetParam().text);
    FAIL() << "accepted";
  } catch (const ConfigError& e) {
    EXPECT_EQ(std::string(e.what()), GetParam().message);
  }
}

std::string with(const std::string& rest) {
  return kModel + rest;
}

INSTANTIATE_TEST_SUITE_P(
    Table, WrongConfig,
    ::testing::Values(
        // The document.
        Wrong{"Empty", "", "c.yaml:1:1: file: (empty): must be a map of keys"},
        Wrong{"List", "- 1\n", "c.yaml:1:1: file: [...]: must be a map of keys"},
        Wrong{"TwoDocuments", "version: 1\n---\nversion: 1\n",
              "c.yaml:2:1: syntax: not YAML: a second document follows the first"},
        Wrong{"StrayBracket", "version: 1\n} ]\n",
              "c.yaml:2:1: syntax: not YAML: did not find expected key (while parsing a block mapping)"},
        Wrong{
            "Unclosed", "version: 1\nmodel: {layers: 3\n",
            "c.yaml:3:1: syntax: not YAML: did not find expected ',' or '}' (while parsing a flow mapping)"},
        Wrong{"Tab", "version: 1\nmodel:\n\tlayers: 3\n",
              "c.yaml:3:1: syntax: not YAML: found character that cannot start any token (while scanning for "
              "the next token)"},
        Wrong{"UnknownAlias", "version: *one\n",
              "c.yaml:1:10: syntax: not YAML: no anchor of this name stands before it"},
        Wrong{"Deep", "version: 1\nmodel: " + std::string(200000, '['),
              "c.yaml:2:71: syntax: not YAML: nested too deeply: must be at most 64 levels"},
        Wrong{"Control", "version: 1\n# \x01\n",
              "c.yaml:2:3: syntax: not YAML: control characters are not allowed"},
        Wrong{"TagDirective", "%YAML 1.1\n%TAG !a! x\n---\nversion: 1\n",
              "c.yaml:2:1: syntax: %TAG: must not be there: a config has no tags"},
        Wrong{"Tag", "version: !!int 1\n", "c.yaml:1:1: version: tag:yaml.org,2002:int: must carry no tag"},
        Wrong{"KeyIsAList", "version: 1\n? [a]\n: 1\n", "c.yaml:2:3: [...]: 1: keys must be plain words"},
        // Keys.
        Wrong{"Version", "version: 2\n", "c.yaml:1:10: version: 2: must be 1, the only version there is"},
        Wrong{"NoVersion", "model: {layers: 3, experts: 16, top_k: 2}\n",
              "c.yaml:1:1: version: missing: required"},
        Wrong{"NoModel", "version: 1\n", "c.yaml:1:1: model: missing: required"},
        Wrong{"NoTopK", "version: 1\nmodel: {layers: 3, experts: 16}\n",
              "c.yaml:2:8: model.top_k: missing: required"},
        Wrong{"UnknownKey", with("supervisor: {enabled: false}\n"),
              "c.yaml:3:1: supervisor: {...}: unknown key; known are version, mode, lag, model, metrics, "
              "health, "
              "expert_bias, "
              "aux_loss_weight, router_temperature, safety, guard, log, collect, layers, timeline"},
        Wrong{"NearKey", with("expert_bais: {policy: stepper}\n"),
              "c.yaml:3:1: expert_bais: {...}: unknown key; did you mean 'expert_bias'?"},
        Wrong{"ShortKey", with("aux_weight: {}\n"),
              "c.yaml:3:1: aux_weight: {...}: unknown key; did you mean 'aux_loss_weight'?"},
        Wrong{"NearInnerKey", "version: 1\nmodel:\n  layers: 3\n  expert: 16\n  top_k: 2\n",
              "c.yaml:4:3: model.expert: 16: unknown key; did you mean 'experts'?"},
        Wrong{"NearLimit", with("expert_bias:\n  limits: {min: -1, max: 1, ratee: 2}\n"),
              "c.yaml:4:29: expert_bias.limits.ratee: 2: unknown key; did you mean 'rate'?"},
        Wrong{"Twice", with("mode: active\nmode: off\n"),
              "c.yaml:4:1: mode: off: given twice, first in line 3"},
        Wrong{"TwiceInFlow", "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2, layers: 4}\n",
              "c.yaml:2:43: model.layers: 4: given twice, first in line 2"},
        // Types.
        Wrong{"EmptySection", with("expert_bias:\nlog: {}\n"),
              "c.yaml:3:1: expert_bias: (empty): must be a map of keys, {} if there are none"},
        Wrong{"NotAMap", with("log: 5\n"), "c.yaml:3:6: log: 5: must be a map of keys, {} if there are none"},
        Wrong{"Quoted", "version: 1\nmodel: {layers: \"3\", experts: 16, top_k: 2}\n",
              "c.yaml:2:17: model.layers: \"3\": must be a whole number"},
        Wrong{"Fraction", "version: 1\nmodel: {layers: 3, experts: 16.5, top_k: 2}\n",
              "c.yaml:2:29: model.experts: 16.5: must be a whole number"},
        Wrong{"Octal", "version: 1\nmodel: {layers: 010, experts: 16, top_k: 2}\n",
              "c.yaml:2:17: model.layers: 010: must be a decimal number without leading zeros (octal in some "
              "readers "
              "of YAML)"},
        Wrong{"Hex", "version: 1\nmodel: {layers: 0x10, experts: 16, top_k: 2}\n",
              "c.yaml:2:17: model.layers: 0x10: must be a whole number"},
        Wrong{
            "Exponent", with("log: {every: 1e3}\n"),
            "c.yaml:3:14: log.every: 1e3: must be a whole number in digits alone, without point or exponent"},
        Wrong{"WiderThanInt", "version: 1\nmodel: {layers: 4294967297, experts: 16, top_k: 2}\n",
              "c.yaml:2:17: model.layers: 4294967297: must be a whole number of at most 31 bits"},
        Wrong{"WiderThanInt64", with("log: {every: 9223372036854775808}\n"),
              "c.yaml:3:14: log.every: 9223372036854775808: must be a whole number of at most 63 bits"},
        Wrong{"NotANumber", with("metrics: {ema: fast}\n"),
              "c.yaml:3:16: metrics.ema: fast: must be a number"},
        Wrong{"Infinite", with("metrics: {capacity_factor: .inf}\n"),
              "c.yaml:3:28: metrics.capacity_factor: .inf: must be finite"},
        Wrong{"NaN", with("metrics: {capacity_factor: nan}\n"),
              "c.yaml:3:28: metrics.capacity_factor: nan: must be finite"},
        Wrong{"Overflow", with("metrics: {capacity_factor: 1e999}\n"),
              "c.yaml:3:28: metrics.capacity_factor: 1e999: must be a number that a double can hold"},
        Wrong{"RotateBelowZero", with("log: {rotate_mb: -1}\n"),
              "c.yaml:3:18: log.rotate_mb: -1: must be from 0 (never) to 1e6"},
        Wrong{"KeepWithoutRotation", with("log: {keep: 2}\n"),
              "c.yaml:3:13: log.keep: 2: must be 0 without log.rotate_mb: only finished pieces are removed"},
        Wrong{"NotAFlag", with("log: {per_expert: 1}\n"),
              "c.yaml:3:19: log.per_expert: 1: must be true or false (also on, off, yes, no)"},
        Wrong{"Mode", with("mode: actve\n"),
              "c.yaml:3:7: mode: actve: must be active, shadow or off; did you mean 'active'?"},
        Wrong{"ScoreSpace", "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2, score_space: logits}\n",
              "c.yaml:2:56: model.score_space: logits: must be probability or logit; did you mean 'logit'?"},
        // Ranges and what must fit together.
        Wrong{"NoLayers", "version: 1\nmodel: {layers: 0, experts: 16, top_k: 2}\n",
              "c.yaml:2:17: model.layers: 0: must be from 1 to 65536"},
        Wrong{"TopKAboveExperts", "version: 1\nmodel:\n  layers: 3\n  experts: 4\n  top_k: 5\n",
              "c.yaml:5:10: model.top_k: 5: must be at most model.experts (4)"},
        Wrong{"NegativeTokens",
              "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2, tokens_per_step: -1}\n",
              "c.yaml:2:60: model.tokens_per_step: -1: must be at least 0"},
        Wrong{"Lag", with("lag: 2\n"), "c.yaml:3:6: lag: 2: must be 0 or 1"},
        Wrong{"TargetsLength", "version: 1\nmodel: {layers: 3, experts: 4, top_k: 2, targets: [0.5, 0.5]}\n",
              "c.yaml:2:51: model.targets: 2: must have one share for each of model.experts (4)"},
        Wrong{"TargetBelowZero", "version: 1\nmodel: {layers: 3, experts: 2, top_k: 1, targets: [1, -1]}\n",
              "c.yaml:2:55: model.targets[1]: -1: must be at least 0"},
        Wrong{"TargetAboveTopK",
              "version: 1\nmodel: {layers: 3, experts: 3, top_k: 2, targets: [0.6, 0.2, 0.2]}\n",
              "c.yaml:2:52: model.targets[0]: 0.6: must be at most 1/top_k (0.5): a token chooses an expert "
              "once"},
        Wrong{"TargetSum", "version: 1\nmodel: {layers: 3, experts: 2, top_k: 1, targets: [0.5, 0.25]}\n",
              "c.yaml:2:51: model.targets: sum 0.75: must sum to 1 within 1e-6"},
        Wrong{"TargetWord", "version: 1\nmodel: {layers: 3, experts: 2, top_k: 1, targets: [0.5, half]}\n",
              "c.yaml:2:57: model.targets[1]: half: must be a number"},
        Wrong{"DomainTwice", "version: 1\nmodel: {layers: 3, experts: 2, top_k: 1, domains: [a, b, a]}\n",
              "c.yaml:2:58: model.domains[2]: a: given twice"},
        Wrong{"Placement", with("metrics: {placement: [0, 1]}\n"),
              "c.yaml:3:22: metrics.placement: 2: must have one device for each of model.experts (16)"},
        Wrong{"Ema", with("metrics: {ema: 0}\n"),
              "c.yaml:3:16: metrics.ema: 0: must be above 0 and at most 1"},
        Wrong{"DeadAfter", with("metrics: {dead_after: 0}\n"),
              "c.yaml:3:23: metrics.dead_after: 0: must be at least 1"},
        Wrong{"UnknownPolicy", with("expert_bias:\n  policy: steper\n"),
              "c.yaml:4:11: expert_bias.policy: steper: unknown policy; did you mean 'stepper'?"},
        Wrong{"FarPolicy", with("aux_loss_weight: {policy: magic}\n"),
              "c.yaml:3:27: aux_loss_weight.policy: magic: unknown policy; those that can are fixed, tuner"},
        Wrong{"PolicyServesAnother", with("router_temperature: {policy: stepper}\n"),
              "c.yaml:3:30: router_temperature.policy: stepper: cannot serve router_temperature; those that "
              "can are "
              "fixed, tuner"},
        Wrong{"UnknownOption", with("expert_bias: {policy: stepper, options: {stp: 1}}\n"),
              "c.yaml:3:42: expert_bias.options.stp: 1: unknown key; did you mean 'step'?"},
        Wrong{"OptionOfFixed", with("expert_bias: {policy: fixed, options: {step: 1}}\n"),
              "c.yaml:3:40: expert_bias.options.step: 1: unknown key; none is known here"},
        Wrong{"OptionType", with("expert_bias: {policy: stepper, options: {window: 2.5}}\n"),
              "c.yaml:3:50: expert_bias.options.window: 2.5: must be a whole number"},
        Wrong{"OptionRange", with("expert_bias: {policy: stepper, options: {step: 1.5}}\n"),
              "c.yaml:3:48: expert_bias.options.step: 1.5: must be from 0 to 1"},
        Wrong{"OptionBelow", with("expert_bias: {policy: stepper, options: {window: 0}}\n"),
              "c.yaml:3:50: expert_bias.options.window: 0: must be at least 1"},
        Wrong{
            "OptionChoice", with("expert_bias: {policy: stepper, options: {norm: rns}}\n"),
            "c.yaml:3:48: expert_bias.options.norm: rns: must be one of raw, mean, rms; did you mean 'rms'?"},
        Wrong{
            "OptionsTogether",
            with("expert_bias:\n  policy: stepper\n  options: {step: 1}\n  limits: {min: -0.5, max: 0.5}\n"),
            "c.yaml:5:12: expert_bias.options: stepper: step must be at most limits.max"},
        Wrong{"OptionMissing", with("aux_loss_weight: {policy: tuner, initial: 0.01}\n"),
              "c.yaml:3:18: aux_loss_weight.options.metric: missing: required by tuner"},
        Wrong{"RateZero", with("expert_bias: {limits: {rate: 0}}\n"),
              "c.yaml:3:30: expert_bias.limits.rate: 0: must be above 0 and at most 1e9"},
        Wrong{"MinAboveMax", with("expert_bias: {limits: {min: 2, max: 1}}\n"),
              "c.yaml:3:29: expert_bias.limits.min: 2: must not exceed max (1)"},
        Wrong{"InitialOutside", with("expert_bias: {initial: 3, limits: {min: -1, max: 1}}\n"),
              "c.yaml:3:24: expert_bias.initial: 3: must lie in [min, max] = [-1, 1]"},
        Wrong{
            "LogOfZero",
            with("aux_loss_weight: {policy: tuner, initial: 0.01, options: {metric: x}, limits: {min: 0}}\n"),
            "c.yaml:3:85: aux_loss_weight.limits.min: 0: must be above 0 for a policy that moves "
            "aux_loss_weight by ratios"},
        Wrong{"NegativeTemperature", with("router_temperature: {policy: fixed, initial: -1}\n"),
              "c.yaml:3:46: router_temperature.initial: -1: must lie in [min, max] = [0.1, 10]"},
        Wrong{"ZeroTemperature", with("router_temperature: {policy: fixed, initial: 0}\n"),
              "c.yaml:3:46: router_temperature.initial: 0: must lie in [min, max] = [0.1, 10]"},
        Wrong{
            "TemperatureRange", with("router_temperature: {limits: {min: 0}}\n"),
            "c.yaml:3:36: router_temperature.limits.min: 0: must be from 1e-9 to 1e9 for router_temperature"},
        Wrong{"CentreOutside", with("expert_bias: {policy: fixed, initial: 1, limits: {min: 1, max: 2}}\n"),
              "c.yaml:3:50: expert_bias.limits.center: true: the range [1, 2] must hold 0"},
        Wrong{"ModelBias", with("expert_bias: {scope: model}\n"),
              "c.yaml:3:22: expert_bias.scope: model: must be layer: biases belong to the experts of one "
              "layer"},
        Wrong{"CentreOfScalar", with("router_temperature: {limits: {center: true}}\n"),
              "c.yaml:3:39: router_temperature.limits.center: true: only expert biases can be centred"},
        Wrong{
            "CentreOffZero", with("expert_bias: {initial: 1, limits: {center: true}}\n"),
            "c.yaml:3:24: expert_bias.initial: 1: must be 0 with limits.center, which keeps the mean there"},
        Wrong{"Cadence", with("expert_bias: {limits: {cadence: 0}}\n"),
              "c.yaml:3:33: expert_bias.limits.cadence: 0: must be at least 1"},
        Wrong{"QuotedRollbackWord", with("safety: {rollback: \"maybe\"}\n"),
              "c.yaml:3:20: safety.rollback: \"maybe\": must be off, on, or a map of its options"},
        Wrong{"RollbackWord", with("safety: {rollback: maybe}\n"),
              "c.yaml:3:20: safety.rollback: maybe: must be off, on, or a map of its options"},
        Wrong{"RollbackRange", with("safety:\n  rollback:\n    loss_jump: -0.5\n"),
              "c.yaml:5:16: safety.rollback.loss_jump: -0.5: must be above 0"},
        Wrong{"Oscillation", with("safety: {oscillation: {threshold: 1}}\n"),
              "c.yaml:3:35: safety.oscillation.threshold: 1: must be between 0 and 1"},
        Wrong{"LogEvery", with("log: {every: 0}\n"), "c.yaml:3:14: log.every: 0: must be at least 1"}),
    [](const ::testing::TestParamInfo<Wrong>& info) { return info.param.name; });

// JSON has no other words.
TEST(Config, QuotedSwitchesAreSwitches) {
  const std::string model =
      "{\"version\": 1, \"model\": {\"layers\": 1, \"experts\": 4, \"top_k\": 1}, \"safety\": ";
  EXPECT_TRUE(parse_config(model + "{\"rollback\": \"on\"}}").safety.rollback.has_value());
  EXPECT_FALSE(parse_config(model + "{\"rollback\": \"off\"}}").safety.rollback.has_value());
}

TEST(Config, FilesThatCannotBeRead) {
  EXPECT_THAT([] { load_config("/nonexistent/c.yaml"); },
              ::testing::ThrowsMessage<ConfigError>(
                  "/nonexistent/c.yaml: cannot be opened: No such file or directory"));
  EXPECT_THAT([] { load_config("/"); }, ::testing::ThrowsMessage<ConfigError>("/: cannot be read"));
}

TEST(Config, MadeInCodeIsCheckedAlike) {
  ControllerConfig c;
  c.model = {.layers = 1, .experts = 4, .top_k = 2, .domains = {}, .targets = {}};
  EXPECT_NO_THROW(validate(c, registry()));
  c.expert_bias.policy = "stepper";
  c.expert_bias.options.set("step", std::int64_t{1});  // a whole number where a number is wanted
  validate(c, registry());
  EXPECT_EQ(c.expert_bias.options.number("step"), 1);
  EXPECT_EQ(c.expert_bias.options.integer("window"), 8);
  c.expert_bias.options.set("windw", std::int64_t{1});
  EXPECT_THAT([&] { validate(c, registry()); },
              ::testing::ThrowsMessage<ConfigError>(
                  "expert_bias.options.windw: 1: not an option of stepper; did you mean 'window'?"));
  c = ControllerConfig();
  c.model = {.layers = 1, .experts = 4, .top_k = 2, .domains = {}, .targets = {}};
  c.expert_bias.policy = "stepper";
  c.expert_bias.options.set("zero_mean_move", 1.0);
  EXPECT_THAT(
      [&] { validate(c, registry()); },
      ::testing::ThrowsMessage<ConfigError>("expert_bias.options.zero_mean_move: 1: must be true or false"));
  c = ControllerConfig();
  EXPECT_THAT([&] { validate(c, registry()); },
              ::testing::ThrowsMessage<ConfigError>("model.layers: 0: must be from 1 to 65536"));
  c.model = {.layers = 1, .experts = 4, .top_k = 2, .domains = {}, .targets = {}};
  c.expert_bias.limits.max = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT([&] { validate(c, registry()); },
              ::testing::ThrowsMessage<ConfigError>("expert_bias.limits.max: nan: must be finite"));
}

TEST(Config, NearestKey) {
  const std::vector<std::string> known = {"rate", "cadence", "router_temperature", "top_k"};
  EXPECT_EQ(nearest_key("rtae", known), "rate");  // a swap is one edit
  EXPECT_EQ(nearest_key("Cadance", known), "cadence");
  EXPECT_EQ(nearest_key("top-k", known), "top_k");
  EXPECT_EQ(nearest_key("temperature", known), "router_temperature");
  EXPECT_EQ(nearest_key("zzz", known), "");
  EXPECT_EQ(nearest_key("", known), "");
  EXPECT_EQ(nearest_key(std::string(100000, 'a'), known), "");
}

// Whatever the bytes, the reader answers with a config or a ConfigError; and what it accepts can be written
// and read.
TEST(Config, MutatedTextIsReadOrRefused) {
  const std::string good = R"(version: 1
mode: shadow
model: {layers: 2, experts: 4, top_k: 2, tokens_per_step: 2048, domains: [a, "b"], targets: [0.4, 0.3, 0.2, 0.1]}
metrics: &m {capacity_factor: 1.5, ema: 0.3, placement: [0, 0, 1, 1]}
expert_bias:
  policy: stepper
  options: {step: 0.1, zero_mean_move: no, window: 3, norm: rms}
  limits: {min: -2, max: 2, rate: .5, deadband: 1e-4}
aux_loss_weight: {policy: tuner, options: {metric: excess_cv}, initial: 0.01, scope: model}
safety: {rollback: off, oscillation: {threshold: 0.2}}
)";
  const std::vector<std::string> pieces = {
      "\t",       "\n",           ": ",      "- ", "{", "}",   "[",     "]",   "*m",
      "&m ",      "!!x ",         "|",       "?",  "~", "NaN", "-1",    "0",   "1e9",
      "1e-999",   "off",          "\"",      "'",  "#", "%",   "---\n", "...", std::string(1, '\0'),
      "\xff\xfe", "\xef\xbb\xbf", "<<: *m\n"};
  std::mt19937_64 random(20240607);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::regex form("c\\.yaml:[1-9][0-9]*:[1-9][0-9]*: [^]*: [^]+");
  int accepted = 0, refused = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string text = good;
    for (std::size_t edits = 1 + below(2); edits-- > 0;) {
      const std::size_t at = below(text.size() + 1);
      switch (below(4)) {
        case 0:
          text.insert(at, pieces[below(pieces.size())]);
          break;
        case 1:
          text.erase(at, 1 + below(8));
          break;
        case 2:
          if (at < text.size()) text[at] = static_cast<char>(random());
          break;
        default:
          text.insert(at, text.substr(below(text.size() + 1), below(40)));
      }
      if (text.empty()) text = " ";
    }
    try {
      const ControllerConfig c = parse(text);
      ++accepted;
      ASSERT_EQ(to_yaml(parse(to_yaml(c))), to_yaml(c)) << text;
    } catch (const ConfigError& e) {
      ++refused;
      ASSERT_TRUE(std::regex_match(e.what(), form)) << e.what() << "\nfor\n" << text;
    } catch (const std::exception& e) {
      FAIL() << e.what() << "\nfor\n" << text;
    }
  }
  EXPECT_GT(accepted, 50);
  EXPECT_GT(refused, 1000);
}

TEST(Config, DeepNestingIsRefused) {
  for (const char* open : {"[", "{a: ", "- ", "? "}) {
    std::string text = "version: ";
    for (int i = 0; i < 20000; ++i) text += open;
    EXPECT_THROW(parse(text), ConfigError) << open;
  }
}

TEST(Config, ATargetMayBeZero) {
  const ControllerConfig c =
      parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, targets: [0.5, 0.3, 0.2, 0]}\n");
  EXPECT_EQ(c.model.targets[3], 0);
  EXPECT_EQ(parse_config(to_yaml(c)).model.targets, c.model.targets);
}

// Each group once copied what holds for all of them.
TEST(HostileInput, ManyGroupsOfLayersAreReadInLinearTime) {
  const auto groups = [](int count, const std::string& rest = "") {
    std::string text = "version: 1\nmodel: {top_k: 2}\nlayers: [";
    for (int g = 0; g < count; ++g) text += "{ids: [" + std::to_string(g) + "], experts: 4},";
    return text + "]\n" + rest;
  };
  EXPECT_EQ(parse_config(groups(4000)).layers.size(), 4000U);
  const auto wrong = [](const std::string& text) {
    try {
      parse_config(text);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(wrong(groups(4097)),
              HasSubstr("4097 groups of layers × 1 spans of the timeline: must be at most 4096"));
  std::string timeline = "timeline: [";
  for (int from = 1; from <= 100; ++from) timeline += "{from: " + std::to_string(from) + "},";
  EXPECT_THAT(wrong(groups(100, timeline + "]")),
              HasSubstr("100 groups of layers × 101 spans of the timeline"));
  // Ids that the entries name: each layer looks for itself among them.
  std::string ids;
  for (int i = 0; i < 65000; ++i) ids += "0,";
  EXPECT_THAT(wrong("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\ntimeline: [{from: 1, freeze: [" +
                    ids + "]}, {from: 2, thaw: [" + ids + "]}]\n"),
              HasSubstr("130000 ids up to here: freeze and thaw of all entries must name at most 65536"));
}

// An alias of four letters stands for as much as its anchor holds.
TEST(HostileInput, AliasesCountAsWhatTheyStandFor) {
  const auto wrong = [](const std::string& text) {
    try {
      parse_config("version: 1\nmodel: {experts: 4, top_k: 2}\n" + text, "c.yaml");
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  std::string ids = "0";
  for (int i = 1; i < 65536; ++i) ids += ',' + std::to_string(i);
  std::string groups = "layers:\n- {ids: &i [" + ids + "]}\n";
  for (int g = 0; g < 200; ++g) groups += "- {ids: *i}\n";
  EXPECT_THAT(wrong(groups), AllOf(HasSubstr("c.yaml:19:"),
                                   HasSubstr("more than 1048576 values, lists and maps: must be at most")));
  // Ten aliases in each of twenty lists: 10^20.
  std::string lists = "a0: &a0 [1]\n";
  for (int l = 1; l <= 20; ++l) {
    lists += "a" + std::to_string(l) + ": &a" + std::to_string(l) + " [";
    for (int i = 0; i < 10; ++i) lists += "*a" + std::to_string(l - 1) + ",";
    lists += "]\n";
  }
  EXPECT_THAT(wrong(lists), HasSubstr("more than 1048576 values, lists and maps"));
  EXPECT_THAT(wrong("health: &h {phases: [*h]}\n"), HasSubstr("an alias within what it stands for"));
}

}  // namespace
}  // namespace moectl
