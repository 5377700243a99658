// The figures of a run from its steps, by hand. `moectl compare` on whole logs: tests/cli/compare_test.cc.
#include "moectl/figures.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace moectl {
namespace {

StepFigures step(std::int64_t at, double max_vio, std::int64_t tokens = 10) {
  StepFigures figures;
  figures.step = at;
  figures.tokens = tokens;
  figures.max_vio = max_vio;
  figures.cv = max_vio / 2;
  figures.floor_max_vio = 0.1;
  figures.floor_cv = 0.05;
  figures.floor = FloorKind::kNoise;
  return figures;
}

TEST(Figures, SettleIsTheFirstOfTwentyStepsWithASmallMedian) {
  std::vector<StepFigures> steps;
  for (int s = 0; s < 60; ++s) steps.push_back(step(s, s < 20 ? 1 : 0.1));
  // The median of steps 18 to 22 is the first with three values of 0.1, below 1.6 · 0.1.
  EXPECT_EQ(compute_figures(steps).settle, 22);
  for (StepFigures& one : steps) one.max_vio = 0.17;
  EXPECT_EQ(compute_figures(steps).settle, std::nullopt);
}

TEST(Figures, MeansWeighStepsByTheirTokens) {
  const std::vector<StepFigures> steps = {step(0, 1, 1), step(1, 0, 9)};
  const Figures figures = compute_figures(steps);
  EXPECT_NEAR(*figures.max_vio, 0.1, 1e-15);
  EXPECT_NEAR(*figures.max_vio_over_floor, 1, 1e-14);
  EXPECT_NEAR(*figures.cv, 0.05, 1e-15);
}

TEST(Figures, ExcessAreaIsOfTheHundredStepsAfterAShift) {
  std::vector<StepFigures> steps;
  for (int s = 0; s < 400; ++s) steps.push_back(step(s, s >= 200 && s < 210 ? 0.6 : 0.1));
  EXPECT_NEAR(*compute_figures(steps, 200).excess_area, 5, 1e-12);
  EXPECT_FALSE(compute_figures(steps).excess_area.has_value());
}

TEST(Figures, WhatNoStepHasIsAbsent) {
  std::vector<StepFigures> steps(2);
  steps[1].step = 1;
  const Figures figures = compute_figures(steps);
  EXPECT_EQ(figures.steps, 2);
  EXPECT_FALSE(figures.max_vio || figures.cv || figures.settle || figures.loss || figures.drop_rate);
  EXPECT_EQ(figures.floor, FloorKind::kNone);
}

TEST(Figures, OnlyReasonsThatCutAMoveAreLimits) {
  EXPECT_TRUE(is_limit(Reason::kRate) && is_limit(Reason::kRange) && is_limit(Reason::kGuard));
  EXPECT_FALSE(is_limit(Reason::kCadence) || is_limit(Reason::kWarmup) || is_limit(Reason::kNoData));
}

}  // namespace
}  // namespace moectl
