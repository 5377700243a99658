#include <gmock/gmock.h>

#include "moectl/config.h"
#include "moectl/feasibility.h"
#include "test_paths.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

const std::string kPublished = std::string(MOECTL_SOURCE_DIR) + "/policies/bands_16x2.yaml";
const std::string kConsistent = std::string(MOECTL_SOURCE_DIR) + "/policies/bands_16x2_consistent.yaml";

TEST(Bands, ThePublishedBandsAreInfeasibleWithNumbers) {
  const TempDir dir;
  const ToolResult text = run_tool(dir, "check " + kPublished);
  EXPECT_EQ(text.code, 1);
  EXPECT_THAT(
      text.err,
      HasSubstr("health.phases[1] (mid): load_cv ≤ 0.6 forces entropy_normalized ≥ 0.8919 at N = 16"));
  EXPECT_THAT(text.err, HasSubstr("nearest feasible: entropy_normalized: [0.892, 0.9875]"));
  EXPECT_THAT(text.err,
              HasSubstr("health.phases[2] (late): load_cv ≤ 0.7 forces entropy_normalized ≥ 0.8595"));
  const ToolResult json = run_tool(dir, "check " + kPublished + " --format json");
  EXPECT_EQ(json.code, 1);
  EXPECT_EQ(json.json()["valid"], true);
  EXPECT_EQ(json.json()["feasible"], false);
  const auto metrics = json.json()["conflicts"][0]["metrics"].get<std::vector<std::string>>();
  EXPECT_GE(metrics.size(), 1U);
}

TEST(Bands, TheConsistentBandsAreFeasible) {
  const TempDir dir;
  const ToolResult text = run_tool(dir, "check " + kConsistent);
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(
      text.out,
      HasSubstr("# bands: each alone and all pairs are feasible; whether all hold together is not decided"));
  EXPECT_THAT(text.out, HasSubstr("# bands: drop_rate does not depend on the loads alone: not judged"));
  EXPECT_EQ(run_tool(dir, "check - --format json", text.out).code, 0);  // what it prints is the same config
}

TEST(Bands, HealthSurvivesTheRoundTrip) {
  for (const std::string& path : {kPublished, kConsistent}) {
    const ControllerConfig config = load_config(path);
    const ControllerConfig again = parse_config(to_yaml(config));
    EXPECT_EQ(to_yaml(again), to_yaml(config));
    const HealthOptions &a = config.monitor.health, &b = again.monitor.health;
    EXPECT_EQ(a.bands, b.bands);
    ASSERT_EQ(a.phases.size(), 3U);
    for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(a.phases[i].bands, b.phases[i].bands);
    ASSERT_EQ(a.alerts.size(), b.alerts.size());
    EXPECT_GE(a.alerts.size(), 13U);
    EXPECT_TRUE(config.monitor.trends && again.monitor.trends);
  }
}

TEST(Bands, SetPointsAndBandsAreJudgedTogether) {
  const TempDir dir;
  const std::string text =
      "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2}\nhealth: {bands: {load_cv: [0, 0.2]}}\n"
      "aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: METRIC, target: 0.5}, limits: "
      "{cadence: 1}}\n";
  const auto with = [&](const std::string& metric) {
    std::string config = text;
    config.replace(config.find("METRIC"), 6, metric);
    return run_tool(dir, "check -", config);
  };
  EXPECT_THAT(with("gini").err, HasSubstr("load_cv ≤ 0.2 forces gini ≤ 0.1153 at N = 16, k = 2"));
  EXPECT_THAT(
      with("load_cv").err,
      HasSubstr("health.bands: the set-point of load_cv, 0.5, lies outside its band [0, 0.2]; nearest "
                "feasible: a set-point of 0.2"));
  EXPECT_EQ(with("drop_rate").code, 0);
}

TEST(Bands, WrongHealthSectionsNameThePlace) {
  const std::string model = "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2}\n";
  const auto error = [&](const std::string& health) -> std::string {
    try {
      parse_config(model + health, "c.yaml");
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(error("health: {dwell: 0}"), "c.yaml:3:17: health.dwell: 0: must be at least 1");
  EXPECT_EQ(error("health: {bands: {load_cvv: [0, 1]}}").substr(0, 47),
            "c.yaml:3:18: health.bands.load_cvv: [...]: unkn");
  EXPECT_THAT(error("health: {bands: {load_cvv: [0, 1]}}"), HasSubstr("did you mean 'load_cv'?"));
  EXPECT_EQ(error("health: {bands: {load_cv: [1, 0]}}"),
            "c.yaml:3:27: health.bands.load_cv: [1, 0]: must be ascending");
  EXPECT_EQ(error("health: {bands: {load_cv: [1]}}"),
            "c.yaml:3:27: health.bands.load_cv: 1 numbers: must be [lowest, highest]");
  EXPECT_EQ(error("health: {phases: {until: 3}}"),
            "c.yaml:3:18: health.phases: {...}: must be a list of maps");
  EXPECT_EQ(error("health: {phases: [{until: 0}]}"),
            "c.yaml:3:27: health.phases[0].until: 0: must be at least 1");
  EXPECT_EQ(error("health: {phases: [{}, {}]}"),
            "c.yaml:3:19: health.phases[0].until: missing: must be given in all phases but the last");
  EXPECT_EQ(error("health: {alerts: [{metric: load_cvs, above: 1}]}"),
            "c.yaml:3:28: health.alerts[0].metric: load_cvs: must be a metric; did you mean 'load_cv'?");
  EXPECT_EQ(error("health: {alerts: [{metric: churn, above: 1}]}"),
            "c.yaml:3:28: health.alerts[0].metric: churn: must be another metric: churn is known only after "
            "the step "
            "has decided");
  EXPECT_EQ(error("health: {bands: {load_p5: [0, 1]}}"),
            "c.yaml:3:27: health.bands.load_p5: load_p5: must be another metric, or metrics.details must be "
            "true: percentiles are computed only then");
  EXPECT_EQ(error("health: {bands: {load_p5: [0, 1]}}\nmetrics: {details: true}"), "");
  EXPECT_THAT(
      error(
          "aux_loss_weight: {policy: pi, options: {metric: load_p95}, initial: 0.01, limits: {min: 1.0e-4}}"),
      HasSubstr("aux_loss_weight.options.metric: load_p95: must be another metric"));
  EXPECT_EQ(error("health: {alerts: [{metric: load_cv}]}"),
            "c.yaml:3:19: health.alerts[0]: load_cv: must have either above or below");
  EXPECT_EQ(error("health: {alerts: [{above: 1}]}"),
            "c.yaml:3:19: health.alerts[0].metric: missing: required");
  EXPECT_EQ(error("metrics: {trend_window: 3}"),
            "c.yaml:3:25: metrics.trend_window: 3: must be from 4 to 10000");
}

}  // namespace
}  // namespace moectl
