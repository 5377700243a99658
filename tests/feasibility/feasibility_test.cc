#include "moectl/feasibility.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "moectl/metrics.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr LoadSpace kPublished{.experts = 16, .top_k = 2};

double normalized(double entropy, int n) {
  return entropy / std::log(n);
}

// ---- Extremal values ----

TEST(Feasibility, ExtentsAtTheTabulatedCvs) {
  struct Row {
    double cv, kl_min, kl_max, en_min, en_max, max_min, max_max, gini_min, gini_max;
    int dead;
  };
  for (const Row& r : {Row{0.2, .0165, .0287, .9897, .9941, .0657, .1109, .0484, .1152, 0},
                       Row{0.6, .1162, .2996, .8919, .9581, .0869, .2077, .1452, .3457, 4},
                       Row{1.0, .2746, .6931, .7500, .9009, .1250, .3046, .2421, .5546, 8}}) {
    const double half = 0.5001e-4;
    const Extent entropy = entropy_at_cv(kPublished, r.cv), top = max_load_at_cv(kPublished, r.cv);
    const Extent gini = gini_at_cv(kPublished, r.cv);
    EXPECT_NEAR(std::log(16) - entropy.max, r.kl_min, half);
    EXPECT_NEAR(std::log(16) - entropy.min, r.kl_max, half);
    EXPECT_NEAR(normalized(entropy.min, 16), r.en_min, half);
    EXPECT_NEAR(normalized(entropy.max, 16), r.en_max, half);
    EXPECT_NEAR(top.min, r.max_min, half);
    EXPECT_NEAR(top.max, r.max_max, half);
    EXPECT_NEAR(gini.min, r.gini_min, half);
    EXPECT_NEAR(gini.max, r.gini_max, half);
    EXPECT_EQ(max_idle_at_cv(kPublished, r.cv), r.dead);
  }
}

TEST(Feasibility, NoExpertGetsMoreThanEveryToken) {
  EXPECT_NEAR(entropy_at_cv({16, 2}, 2.2).max, 1.441, 0.0005);
  EXPECT_NEAR(entropy_at_cv({16, 1}, 2.2).max, 1.772, 0.0005);
  EXPECT_EQ(max_load_at_cv({16, 2}, 2.2).max, 0.5);
  // At the largest CV all load lies on k experts, whatever is asked.
  for (const int k : {1, 2, 3, 8}) {
    const double top = std::sqrt(16.0 / k - 1);
    EXPECT_NEAR(entropy_at_cv({16, k}, top).min, std::log(k), 1e-7);
    EXPECT_NEAR(entropy_at_cv({16, k}, top).max, std::log(k), 1e-4);
    EXPECT_NEAR(gini_at_cv({16, k}, top).min, (16.0 - k) / 16, 1e-4);
    EXPECT_NEAR(gini_at_cv({16, k}, top).max, (16.0 - k) / 16, 1e-4);
  }
}

TEST(Feasibility, GiniMaximumIsTheRampWhileItFits) {
  for (const int n : {2, 5, 16, 100}) {
    const double last = std::sqrt((n + 1.0) / (3 * (n - 1.0)));
    for (const double share : {0.1, 0.5, 0.99}) {
      const double cv = share * last;
      EXPECT_NEAR(gini_at_cv({n, 1}, cv).max, cv * std::sqrt((n * n - 1.0) / 3) / n, 1e-9) << n << " " << cv;
      EXPECT_NEAR(gini_at_cv({n, 1}, cv).min, cv * std::sqrt(n - 1.0) / n, 1e-12);
    }
  }
}

TEST(Feasibility, UniformIsTheOnlyLoadWithoutSpread) {
  for (const int n : {1, 2, 16, 300}) {
    const LoadSpace space{n, 1};
    EXPECT_NEAR(entropy_at_cv(space, 0).min, std::log(n), 1e-9);
    EXPECT_NEAR(entropy_at_cv(space, 0).max, std::log(n), 1e-9);
    EXPECT_NEAR(gini_at_cv(space, 0).max, 0, 1e-9);
    EXPECT_NEAR(max_load_at_cv(space, 0).max, 1.0 / n, 1e-12);
    EXPECT_NEAR(entropy_at_gini(space, 0).min, std::log(n), 1e-9);
    EXPECT_NEAR(entropy_at_max_load(space, 1.0 / n).min, std::log(n), 1e-9);
  }
}

// ---- No random load beats them ----

struct Load {
  std::vector<double> p;
  double cv = 0, entropy = 0, gini = 0, max = 0;
  int idle = 0;
};

Load measured(std::vector<double> p) {
  Load load;
  const double n = static_cast<double>(p.size());
  std::sort(p.begin(), p.end());
  double squares = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    squares += (p[i] - 1 / n) * (p[i] - 1 / n);
    if (p[i] > 0) load.entropy -= p[i] * std::log(p[i]);
    load.gini += (2.0 * static_cast<double>(i) - n + 1) * p[i] / n;
    load.idle += p[i] == 0;
  }
  load.cv = std::sqrt(squares * n);
  load.max = p.back();
  load.p = std::move(p);
  return load;
}

// Loads of very different kinds, those near the extremal ones among them, with none above 1/k.
Load random_load(int n, int k, std::mt19937_64& random) {
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<double> p(static_cast<std::size_t>(n));
  const auto kind = random() % 6;
  const double sharpness = std::pow(10, 2 * uniform(random) - 1);
  const std::size_t few = 1 + random() % p.size();
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double rank = static_cast<double>(i + 1);
    switch (kind) {
      case 0:
        p[i] = std::pow(uniform(random), sharpness);
        break;
      case 1:  // a ramp
        p[i] = std::max(0.0, rank - static_cast<double>(few) + uniform(random) * 0.01);
        break;
      case 2:  // one large, the rest equal
        p[i] = i == 0 ? 1 + sharpness * 10 : 1 + uniform(random) * 0.01;
        break;
      case 3:  // a few equal
        p[i] = i < few ? 1 : 0;
        break;
      case 4:  // exponential
        p[i] = std::exp(-sharpness * rank / 4);
        break;
      default:  // few levels
        p[i] = static_cast<double>(random() % 4) * sharpness + (i < few ? 1 : 0);
    }
  }
  for (int round = 0; round < 200; ++round) {  // cap at 1/k, hand the rest to those below in proportion
    double sum = 0, free = 0;
    for (const double x : p) sum += x;
    if (sum <= 0) p[0] = sum = 1;
    for (double& x : p) x /= sum;
    double over = 0;
    for (double& x : p) {
      if (x >= 1.0 / k) {
        over += x - 1.0 / k;
        x = 1.0 / k;
      } else {
        free += x;
      }
    }
    if (over < 1e-15) break;
    for (double& x : p) {
      if (x < 1.0 / k) x += free > 0 ? over * x / free : over / (n - static_cast<double>(k));
    }
  }
  return measured(std::move(p));
}

TEST(Feasibility, RandomSearchNeverBeatsTheExtremes) {
  std::mt19937_64 random(4);
  for (const auto& [n, k, trials] : {std::tuple{2, 1, 200},
                                     {5, 2, 600},
                                     {8, 3, 600},
                                     {9, 4, 600},
                                     {16, 1, 300},
                                     {16, 2, 600},
                                     {40, 4, 100}}) {
    const LoadSpace space{n, k};
    for (int trial = 0; trial < trials; ++trial) {
      const Load load = random_load(n, k, random);
      ASSERT_LE(load.max, 1.0 / k + 1e-9);
      const auto inside = [&, &n = n, &k = k](double value, const Extent& extent, const char* what) {
        EXPECT_GE(value, extent.min - 1e-7) << what << " N " << n << " k " << k << " trial " << trial;
        EXPECT_LE(value, extent.max + 1e-7) << what << " N " << n << " k " << k << " trial " << trial;
      };
      inside(load.entropy, entropy_at_cv(space, load.cv), "entropy at cv");
      inside(load.max, max_load_at_cv(space, load.cv), "max at cv");
      inside(load.gini, gini_at_cv(space, load.cv), "gini at cv");
      inside(load.entropy, entropy_at_max_load(space, load.max), "entropy at max");
      inside(load.gini, gini_at_max_load(space, load.max), "gini at max");
      inside(load.entropy, entropy_at_gini(space, load.gini), "entropy at gini");
      EXPECT_LE(load.idle, max_idle_at_cv(space, load.cv));
    }
  }
}

// ---- Bands ----

std::vector<std::string> messages(const Feasibility& f) {
  std::vector<std::string> out;
  for (const Conflict& c : f.conflicts) out.push_back(c.message);
  return out;
}

TEST(Feasibility, ExplainsThePublishedConflictInNumbers) {
  const Feasibility f = judge(kPublished, {{"load_cv", {0.3, 0.6}}, {"entropy_normalized", {0.70, 0.85}}});
  ASSERT_EQ(f.conflicts.size(), 1U);
  EXPECT_THAT(f.conflicts[0].metrics, ElementsAre("load_cv", "entropy_normalized"));
  EXPECT_EQ(f.conflicts[0].message,
            "load_cv ≤ 0.6 forces entropy_normalized ≥ 0.8919 at N = 16, k = 2; entropy_normalized in [0.7, "
            "0.85] is "
            "wanted");
  EXPECT_THAT(f.conflicts[0].suggestion, ::testing::StrEq("entropy_normalized: [0.892, 0.9875]"));
}

TEST(Feasibility, PublishedBands) {
  const auto conflicts = [](const Bands& bands) { return judge(kPublished, bands).conflicts.size(); };
  const Bands early = {{"entropy_normalized", {.85, .95}},
                       {"kl_to_uniform", {.1, .3}},
                       {"load_cv", {.2, .4}},
                       {"max_load", {.07, .10}}};
  const Bands mid = {{"entropy_normalized", {.70, .85}},
                     {"kl_to_uniform", {.3, .8}},
                     {"load_cv", {.3, .6}},
                     {"max_load", {.10, .18}}};
  const Bands late = {{"entropy_normalized", {.65, .80}},
                      {"kl_to_uniform", {.5, 1.2}},
                      {"load_cv", {.4, .7}},
                      {"max_load", {.12, .20}}};
  const Bands healthy = {
      {"entropy_normalized", {.70, .85}}, {"kl_to_uniform", {.3, .8}}, {"load_cv", {.3, .6}},
      {"max_load", {.08, .15}},           {"dead_experts", {0, 2}},    {"drop_rate", {0, .03}}};
  EXPECT_GT(conflicts(mid), 0U);
  EXPECT_GT(conflicts(late), 0U);
  EXPECT_GT(conflicts(healthy), 0U);
  // Early: entropy_normalized ≤ .95 needs a CV of at least .391.
  EXPECT_EQ(conflicts({{"entropy_normalized", {.85, .95}}, {"load_cv", {.2, .4}}}), 0U);
  EXPECT_EQ(conflicts({{"entropy_normalized", {.85, .95}}, {"load_cv", {.2, .392}}}), 0U);
  EXPECT_EQ(conflicts({{"entropy_normalized", {.85, .95}}, {"load_cv", {.2, .390}}}), 1U);
  // "collapse" and "weak specialization" are consistent.
  EXPECT_EQ(conflicts({{"entropy_normalized", {-1, .5}}, {"load_cv", {1.5, 9}}, {"max_load", {.35, 1}}}), 0U);
  EXPECT_EQ(conflicts({{"entropy_normalized", {.95, 1}}, {"kl_to_uniform", {0, .15}}, {"load_cv", {0, .2}}}),
            0U);
  (void)early;
}

TEST(Feasibility, KlAndEntropyAreOneConstraint) {
  const Feasibility f = judge(kPublished, {{"kl_to_uniform", {.5, 1.2}}, {"entropy_normalized", {.9, .95}}});
  ASSERT_EQ(f.conflicts.size(), 1U);
  EXPECT_THAT(f.conflicts[0].message, HasSubstr("is the same as"));
}

TEST(Feasibility, SingleBandsOutsideTheirRange) {
  EXPECT_THAT(messages(judge(kPublished, {{"load_cv", {3, 4}}})),
              ElementsAre("load_cv in [3, 4] cannot be: load_cv ≤ 2.646 at N = 16, k = 2"));
  EXPECT_THAT(messages(judge(kPublished, {{"max_load", {0.6, 0.7}}})),
              ElementsAre("max_load in [0.6, 0.7] cannot be: max_load ≤ 0.5 at N = 16, k = 2"));
  EXPECT_EQ(judge(kPublished, {{"entropy_normalized", {0.1, 0.2}}}).conflicts.size(),
            1U);  // k = 2: at least ln 2
  EXPECT_EQ(judge({16, 1}, {{"entropy_normalized", {0.1, 0.2}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(kPublished, {{"dead_experts", {15, 16}}}).conflicts.size(), 1U);
}

TEST(Feasibility, IdleExpertsAreWholeOnes) {
  EXPECT_FALSE(judge(kPublished, {{"dead_experts", {0, 4.5}}, {"inactive_experts", {4.6, 12}}}).feasible());
  EXPECT_TRUE(judge(kPublished, {{"dead_experts", {0, 5}}, {"inactive_experts", {4.6, 12}}}).feasible());
}

TEST(Feasibility, TargetsBelowTheNoiseFloor) {
  const LoadSpace space{.experts = 16, .top_k = 2, .tokens = 2048};  // floors .0585 and .108
  EXPECT_EQ(judge(space, {{"load_cv", {0, 0.05}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"load_cv", {0, 0.06}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(space, {{"max_vio", {0, 0.10}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"max_vio", {0, 0.12}}}).conflicts.size(), 0U);
  EXPECT_THAT(messages(judge(space, {{"load_cv", {0, 0.05}}}))[0], HasSubstr("noise floor"));
  EXPECT_EQ(judge(kPublished, {{"load_cv", {0, 0.05}}}).conflicts.size(), 0U);  // tokens not known
  // At that CV: KL is about CV²/2 = .00171, the entropy 1 - .00171 / ln 16 of its largest, Gini at least .05846 √15 /
  // 16.
  EXPECT_EQ(judge(space, {{"kl_to_uniform", {0, 0.0015}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"kl_to_uniform", {0, 0.0018}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(space, {{"entropy_normalized", {0.9995, 1}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"entropy_normalized", {0.9993, 1}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(space, {{"effective_experts", {15.99, 16}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"gini", {0, 0.0141}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(space, {{"gini", {0, 0.0142}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(space, {{"dead_experts", {0, 0}}}).conflicts.size(), 0U);
  EXPECT_THAT(messages(judge(space, {{"entropy_normalized", {0.9999, 1}}}))[0],
              HasSubstr("2048 tokens still shows entropy_normalized ≤ 0.9995 at N = 16"));
}

TEST(Feasibility, OpenBands) {
  const double inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(
      judge(kPublished, {{"load_cv", {-inf, 0.6}}, {"entropy_normalized", {-inf, 0.85}}}).conflicts.size(),
      1U);
  EXPECT_EQ(
      judge(kPublished, {{"load_cv", {0.3, inf}}, {"entropy_normalized", {-inf, 0.85}}}).conflicts.size(),
      0U);
  EXPECT_EQ(
      judge(kPublished, {{"load_cv", {1.0, inf}}, {"entropy_normalized", {0.95, inf}}}).conflicts.size(), 1U);
  EXPECT_EQ(judge(kPublished, {{"load_cv", {1.0, inf}}, {"dead_experts", {0, 0}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge(kPublished, {{"load_cv", {-inf, 0.6}}, {"dead_experts", {5, inf}}}).conflicts.size(), 1U);
}

TEST(Feasibility, MetricsThatDoNotDependOnTheLoadsAreNotJudged) {
  const Feasibility f = judge(kPublished, {{"drop_rate", {0, .03}}, {"load_cv", {0, 1}}});
  EXPECT_TRUE(f.feasible());
  EXPECT_THAT(f.not_judged, ElementsAre("drop_rate"));
}

TEST(Feasibility, MisuseThrows) {
  EXPECT_THROW(judge(kPublished, {{"load_cvv", {0, 1}}}), std::invalid_argument);
  EXPECT_THROW(judge(kPublished, {{"load_cv", {1, 0}}}), std::invalid_argument);
  EXPECT_THROW(judge(kPublished, {{"load_cv", {std::nan(""), 0}}}), std::invalid_argument);
  EXPECT_THROW(judge({0, 1}, {}), std::invalid_argument);
  EXPECT_THROW(judge({4, 5}, {}), std::invalid_argument);
}

// Bands around a load that exists are feasible: pairs, and all together.
TEST(Feasibility, BandsAroundAnExistingLoadAreNeverRefused) {
  std::mt19937_64 random(6);
  std::uniform_real_distribution<double> width(0, 0.05);
  for (int trial = 0; trial < 400; ++trial) {
    const int n = 2 + static_cast<int>(random() % 14), k = 1 + static_cast<int>(random() % 2);
    if (k >= n) continue;
    const Load load = random_load(n, k, random);
    const double scale = trial % 2 == 0 ? 1 : 1e-3;
    const auto around = [&](double value) {
      return Band{value - scale * width(random), value + scale * width(random)};
    };
    const Bands bands = {{"load_cv", around(load.cv)},
                         {"entropy_normalized", around(load.entropy / std::log(n))},
                         {"kl_to_uniform", around(std::log(n) - load.entropy)},
                         {"effective_experts", around(std::exp(load.entropy))},
                         {"gini", around(load.gini)},
                         {"max_vio", around(load.max * n - 1)},
                         {"inactive_experts", around(load.idle)}};
    EXPECT_THAT(messages(judge({n, k}, bands)), ElementsAre()) << "N " << n << " k " << k;
  }
}

// What a suggestion says, and that it can hold together with the bands it was made against.
void expect_suggestion_holds(const LoadSpace& space, const Bands& bands, const Conflict& conflict) {
  const std::string& text = conflict.suggestion;
  const std::size_t colon = text.find(": [");
  ASSERT_NE(colon, std::string::npos) << conflict.message;
  const std::string metric = text.substr(0, colon);
  double low = 1, high = 0;
  ASSERT_EQ(std::sscanf(text.c_str() + colon, ": [%lf, %lf]", &low, &high), 2) << text;
  EXPECT_LE(low, high) << text;
  EXPECT_THAT(conflict.metrics, ::testing::Contains(metric));
  Bands together;
  for (const std::string& name : conflict.metrics) together[name] = bands.at(name);
  together[metric] = {low, high};
  EXPECT_THAT(messages(judge(space, together)), ElementsAre()) << text << " for: " << conflict.message;
}

TEST(Feasibility, SuggestionsAreFeasible) {
  std::mt19937_64 random(12);
  std::uniform_real_distribution<double> uniform(0, 1);
  const std::vector<std::string> metrics = {
      "load_cv", "load_std",           "max_load",      "max_vio",          "gini",
      "entropy", "entropy_normalized", "kl_to_uniform", "effective_experts"};
  int alone = 0, pairs = 0, together = 0;
  for (int trial = 0; trial < 1500; ++trial) {
    const int n = 2 + static_cast<int>(random() % 30), k = 1 + static_cast<int>(random() % 2);
    if (k >= n) continue;
    const LoadSpace space{n, k, trial % 4 == 0 ? 256 << random() % 6 : 0};
    Bands bands;
    // Three bands about as often as two; of no width, narrow and wide.
    for (std::size_t i = 0; i < 2 + random() % 2; ++i) {
      const Load load = random_load(n, k, random);
      const std::map<std::string, double> values = {{"load_cv", load.cv},
                                                    {"load_std", 100 * load.cv / n},
                                                    {"max_load", load.max},
                                                    {"max_vio", load.max * n - 1},
                                                    {"gini", load.gini},
                                                    {"entropy", load.entropy},
                                                    {"entropy_normalized", load.entropy / std::log(n)},
                                                    {"kl_to_uniform", std::log(n) - load.entropy},
                                                    {"effective_experts", std::exp(load.entropy)}};
      const std::string& metric = metrics[random() % metrics.size()];
      const double value = values.at(metric) * (random() % 8 == 0 ? 3 : 1);
      const double width =
          trial % 3 == 0 ? 0 : std::abs(value) * uniform(random) * (trial % 3 == 1 ? 0.01 : 0.5);
      bands[metric] = {value - width, value + width};
    }
    for (const Conflict& conflict : judge(space, bands).conflicts) {
      (conflict.metrics.size() == 1 ? alone : conflict.metrics.size() == 2 ? pairs : together) += 1;
      expect_suggestion_holds(space, bands, conflict);
    }
  }
  EXPECT_GT(alone, 50);
  EXPECT_GT(pairs, 50);
  EXPECT_GT(together, 3);
}

TEST(Feasibility, ABandOfOneValueIsNeverInverted) {
  const Feasibility f = judge({16, 2, 2048}, {{"load_cv", {0.05, 0.05}}});
  ASSERT_EQ(f.conflicts.size(), 1U);
  EXPECT_EQ(f.conflicts[0].suggestion, "load_cv: [0.05847, 0.05847]");
  EXPECT_THAT(f.conflicts[0].message, HasSubstr("load_cv = 0.05 lies under the noise floor"));
  // From above: 2.646 is beyond √7.
  EXPECT_EQ(judge({16, 2}, {{"load_cv", {3, 3}}}).conflicts.at(0).suggestion, "load_cv: [2.645, 2.645]");
  // One value against one value: √7 · … leaves less between its edges than four digits can tell.
  const Feasibility two = judge({2, 1}, {{"load_cv", {0.5, 0.5}}, {"max_load", {0.9, 0.9}}});
  ASSERT_EQ(two.conflicts.size(), 1U);
  EXPECT_EQ(two.conflicts[0].suggestion, "max_load: [0.75, 0.75]");
}

TEST(Feasibility, AnInfeasibleBandDoesNotHideOtherConflicts) {
  const Feasibility f = judge(
      kPublished, {{"load_cv", {0.3, 0.6}}, {"entropy_normalized", {0.70, 0.85}}, {"max_load", {0.6, 0.7}}});
  EXPECT_THAT(messages(f), ElementsAre(HasSubstr("max_load in [0.6, 0.7] cannot be"),
                                       HasSubstr("load_cv ≤ 0.6 forces entropy_normalized ≥ 0.8919")));
}

// Pairs that agree, and do not agree together: (.4, .4, .1, .1) has the most entropy that four experts can
// have at this CV with none above .4.
TEST(Feasibility, ThreeBandsCanBeProvablyInfeasible) {
  const LoadSpace space{4, 1};
  const Bands bands = {{"load_cv", {0.6, 0.65}}, {"max_load", {0.2, 0.4}}, {"entropy", {1.21, 1.3}}};
  for (const char* left_out : {"load_cv", "max_load", "entropy"}) {
    Bands two = bands;
    two.erase(left_out);
    EXPECT_TRUE(judge(space, two).feasible()) << left_out;
  }
  const Feasibility f = judge(space, bands);
  EXPECT_THAT(messages(f), ElementsAre("provably infeasible together: max_load ≤ 0.4 and load_cv ≥ 0.6 force "
                                       "entropy ≤ 1.194 at N = 4, k = 1; entropy in [1.21, 1.3] is wanted"));
  EXPECT_THAT(f.conflicts.at(0).metrics, ElementsAre("max_load", "load_cv", "entropy"));
  EXPECT_FALSE(f.undecided_together);
  Bands two_caps = bands;  // the tighter one counts
  two_caps["max_to_mean"] = {1, 1.95};
  EXPECT_FALSE(judge(space, two_caps).feasible());
  Bands relaxed = bands;
  relaxed["entropy"] = {1.19, 1.3};
  EXPECT_TRUE(judge(space, relaxed).feasible());
  EXPECT_TRUE(judge(space, relaxed).undecided_together);
}

// Every load of four experts in steps of 1/240: what the best of them reach is what the formulas say, from
// both sides. So pairs are decided exactly, not only never refused wrongly.
TEST(Feasibility, TheExtremesAreReached) {
  constexpr int kParts = 240;
  for (const int k : {1, 2, 3}) {
    const LoadSpace space{4, k};
    std::vector<Load> loads;
    for (int a = kParts / 4; a * k <= kParts; ++a) {
      for (int b = 0; b <= a && a + b <= kParts; ++b) {
        for (int c = 0; c <= b && a + b + c <= kParts; ++c) {
          const int d = kParts - a - b - c;
          if (d > c || d < 0) continue;
          loads.push_back(measured({a / 240.0, b / 240.0, c / 240.0, d / 240.0}));
        }
      }
    }
    ASSERT_GT(loads.size(), 1000U);
    const auto compare = [&](const char* what, double Load::*x, double Load::*y, auto&& extent) {
      // The loads that lie within a hundredth of each of ten values of x.
      double most = 0;
      for (const Load& load : loads) most = std::max(most, load.*x);
      for (int part = 1; part < 10; ++part) {
        const double at = most * part / 10;
        double least = 1e9, largest = -1e9;
        for (const Load& load : loads) {
          if (std::abs(load.*x - at) > 0.01 * most) continue;
          least = std::min(least, load.*y);
          largest = std::max(largest, load.*y);
        }
        if (least > largest) continue;  // values that four loads cannot have
        const Extent below = extent(at - 0.01 * most), above = extent(at + 0.01 * most);
        const double low = std::min(below.min, above.min), high = std::max(below.max, above.max);
        EXPECT_GE(least, low - 1e-9) << what << " k " << k << " at " << at;
        EXPECT_LE(largest, high + 1e-9) << what << " k " << k << " at " << at;
        EXPECT_LE(least, low + 0.05) << what << " k " << k << " at " << at;
        EXPECT_GE(largest, high - 0.05) << what << " k " << k << " at " << at;
      }
    };
    const auto by = [&](Extent (*formula)(const LoadSpace&, double)) {
      return [&space, formula](double x) { return formula(space, x); };
    };
    compare("entropy at cv", &Load::cv, &Load::entropy, by(entropy_at_cv));
    compare("max at cv", &Load::cv, &Load::max, by(max_load_at_cv));
    compare("gini at cv", &Load::cv, &Load::gini, by(gini_at_cv));
    compare("entropy at max", &Load::max, &Load::entropy, by(entropy_at_max_load));
    compare("gini at max", &Load::max, &Load::gini, by(gini_at_max_load));
    compare("entropy at gini", &Load::gini, &Load::entropy, by(entropy_at_gini));
  }
}

// Targets of four experts: 1/2, 3/8, 1/8, 0; top-1, 800 tokens. On target:
// entropy .974 nats (.7028 of ln 4), Gini (3 · .5 + .375 - .125)/4 = .4375, and the loads' own CV √.625 = .7906.
constexpr double kShares[] = {0.5, 0.375, 0.125, 0};
constexpr LoadSpace kUnequal{.experts = 4, .top_k = 1, .tokens = 800, .targets = kShares};

TEST(FeasibilityWithTargets, LoadsCannotBeMoreEvenThanTheTargets) {
  const auto conflicts = [](const char* metric, double low, double high) {
    return judge(kUnequal, {{metric, {low, high}}}).conflicts.size();
  };
  EXPECT_EQ(conflicts("entropy_normalized", 0.75, 0.95), 1U);  // of equal experts all of these can be
  EXPECT_EQ(conflicts("entropy_normalized", 0.65, 0.75), 0U);
  EXPECT_EQ(conflicts("kl_to_uniform", 0, 0.40), 1U);  // 1.386 - .974 = .412
  EXPECT_EQ(conflicts("kl_to_uniform", 0, 0.42), 0U);
  EXPECT_EQ(conflicts("gini", 0.1, 0.43), 1U);
  EXPECT_EQ(conflicts("gini", 0.1, 0.44), 0U);
  EXPECT_EQ(conflicts("max_load", 0.3, 0.49), 1U);
  EXPECT_EQ(conflicts("max_load", 0.3, 0.51), 0U);
  EXPECT_EQ(conflicts("inactive_experts", 0, 0), 1U);  // one has target 0
  EXPECT_EQ(conflicts("inactive_experts", 0, 1), 0U);
  // A load has variance w (1 - w)/800, of all .59375/800: chance makes the CV √(.625 + 4 · .59375/800), 19.811 points.
  EXPECT_EQ(conflicts("load_std", 1, 19.8), 1U);
  EXPECT_EQ(conflicts("load_std", 1, 19.82), 0U);
  const auto found = judge(kUnequal, {{"entropy_normalized", {0.75, 0.95}}}).conflicts[0];
  EXPECT_THAT(found.message,
              HasSubstr("more even than model.targets: a load on its targets, of 800 tokens, has "
                        "entropy_normalized ≤ 0.7029 at N = 4, k = 1"));
  EXPECT_EQ(judge(kUnequal, {{"entropy_normalized", {0.5, 0.7}}, {"gini", {0, 0.6}}}).conflicts.size(), 0U);
  EXPECT_EQ(judge({.experts = 4, .top_k = 1, .tokens = 0, .targets = kShares}, {{"gini", {0.1, 0.43}}})
                .conflicts.size(),
            1U);  // without knowing the tokens
}

// Relative variances of a token: 1, 5/3 and 7. Their mean over 800 is the square of .06346.
TEST(FeasibilityWithTargets, RelativeMetricsHaveTheirOwnFloorsAndBounds) {
  const auto conflicts = [](const char* metric, double low, double high) {
    return judge(kUnequal, {{metric, {low, high}}}).conflicts.size();
  };
  EXPECT_EQ(conflicts("load_cv", 0, 0.0634), 1U);
  EXPECT_EQ(conflicts("load_cv", 0, 0.0635), 0U);
  const double floor = *noise_floor_max_vio(LoadTargets(4, kShares), 1, 800);
  EXPECT_EQ(conflicts("max_vio", 0, floor - 1e-4), 1U);
  EXPECT_EQ(conflicts("max_vio", 0, floor + 1e-4), 0U);
  EXPECT_EQ(conflicts("max_to_mean", 1, 1 + floor - 1e-4), 1U);
  // All tokens on the expert with target 1/8: 8 times its target.
  EXPECT_EQ(conflicts("max_vio", 6.9, 8), 0U);
  EXPECT_EQ(conflicts("max_vio", 7.1, 8), 1U);
  // … and the two others without any: √((49 + 1 + 1)/3).
  EXPECT_EQ(conflicts("load_cv", 4.12, 5), 0U);
  EXPECT_EQ(conflicts("load_cv", 4.13, 5), 1U);
  // All tokens on the expert with target 0; the other three are dead.
  EXPECT_EQ(conflicts("dead_experts", 3, 3), 0U);
  EXPECT_EQ(conflicts("dead_experts", 4, 4), 1U);
}

TEST(FeasibilityWithTargets, RelativeMetricsAreNotComparedWithThoseOfTheLoads) {
  // At equal targets a CV of .2 and a largest load of .5 exclude each other.
  const Bands bands = {{"load_cv", {0.1, 0.2}}, {"max_load", {0.5, 0.6}}};
  EXPECT_EQ(judge({.experts = 4, .top_k = 1}, bands).conflicts.size(), 1U);
  const Feasibility found = judge(kUnequal, bands);
  EXPECT_TRUE(found.feasible());
  EXPECT_THAT(found.judged_alone, ElementsAre("load_cv"));
  EXPECT_TRUE(judge(kUnequal, {{"load_cv", {0.1, 0.2}}}).judged_alone.empty());
  // The same number by two names is.
  EXPECT_EQ(judge(kUnequal, {{"max_vio", {0.2, 0.3}}, {"max_to_mean", {1.5, 1.6}}}).conflicts.size(), 1U);
}

}  // namespace
}  // namespace moectl
