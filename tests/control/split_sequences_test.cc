// Sequences that are split over records and ranks, and records that recomputation repeats.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "ranks.h"
#include "temp_dir.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Indices = std::vector<std::int64_t>;

constexpr int kExperts = 8, kTopK = 2, kSequences = 6, kLength = 64;

ControllerConfig config_of(int split_sequences) {
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.model.split_sequences = split_sequences;
  config.collect.sequences = true;
  return config;
}

/// Tokens of one sequence, which prefer two experts of its own.
Indices sequence(int which) {
  std::mt19937_64 random(static_cast<std::uint64_t>(which) + 1);
  Indices experts;
  for (int t = 0; t < kLength; ++t) {
    const auto first = static_cast<std::int64_t>(random() % 3 == 0 ? random() % kExperts
                                                                   : static_cast<unsigned>(which % kExperts));
    experts.push_back(first);
    experts.push_back((first + 1 + static_cast<std::int64_t>(random() % 3)) % kExperts);
  }
  return experts;
}

std::vector<std::string> notices_of(const StepReport& report) {
  std::vector<std::string> all;
  for (const Notice& notice : report.notices) {
    all.push_back(std::string(name_of(notice.kind)) + '@' + std::to_string(notice.layer) + ": " +
                  std::string(notice.text));
  }
  return all;
}

struct Seen {
  Metrics metrics;
  std::vector<std::int64_t> sums;
  std::vector<std::string> notices;
};

/// The last of three steps on rank 0, with each sequence cut into `pieces`, one record each, dealt out to the ranks.
Seen run(int pieces, int size, int split_sequences, int lag, int sequences = kSequences) {
  Ranks ranks(size);
  Seen seen;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      ControllerConfig config = config_of(split_sequences);
      config.lag = lag;
      Controller controller(config);
      controller.set_reduction(ranks.reduction());
      for (int step = 0; step < 3; ++step) {
        for (int s = 0; s < sequences; ++s) {
          const Indices experts = sequence(s), ids(kLength, s);
          for (int piece = 0; piece < pieces; ++piece) {
            if ((s + piece) % size != rank) continue;
            const auto tokens = static_cast<std::size_t>(kLength / pieces),
                       from = static_cast<std::size_t>(piece) * tokens;
            controller.record(0, {.experts = std::span(experts).subspan(from * kTopK, tokens * kTopK),
                                  .sequence_ids = std::span(ids).subspan(from, tokens)});
          }
        }
        const StepReport& report = controller.step();
        if (rank != 0) continue;
        seen.metrics = *report.layers[0].metrics;
        const auto flat = report.layers[0].stats->flat();
        seen.sums.assign(flat.begin(), flat.end());
        for (const std::string& notice : notices_of(report)) seen.notices.push_back(notice);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return seen;
}

TEST(FieldCases, C4_ASequenceInPiecesOverRanksHasTheFloorOfTheWhole) {
  const Seen whole = run(1, 1, 0, 0);
  ASSERT_TRUE(whole.metrics.sampling_floor_cv);
  for (const int lag : {0, 1}) {
    for (const int ranks : {1, 4}) {
      for (const int pieces : {1, 2, 8}) {
        const Seen split = run(pieces, ranks, kSequences, lag);
        EXPECT_EQ(split.metrics.sampling_floor_cv, whole.metrics.sampling_floor_cv)
            << pieces << ", " << ranks;
        EXPECT_EQ(split.metrics.sampling_floor_max_vio, whole.metrics.sampling_floor_max_vio);
        EXPECT_THAT(split.notices, IsEmpty());
      }
    }
  }
  // Without it, each piece counts as a sequence, and the floor falls.
  EXPECT_LT(*run(8, 4, 0, 0).metrics.sampling_floor_cv, 0.8 * *whole.metrics.sampling_floor_cv);
}

TEST(FieldCases, C4_MoreSplitSequencesThanStatedHaveNoFloorAndSaySoOnce) {
  const Seen seen = run(2, 4, kSequences, 0, kSequences + 1);
  EXPECT_FALSE(seen.metrics.sampling_floor_cv);
  EXPECT_TRUE(seen.metrics.noise_floor_cv);
  EXPECT_THAT(
      seen.notices,
      ElementsAre("config@-1: model.split_sequences is 6, and a sequence came with an id that is not below "
                  "it: the sampling floor is not known"));
}

// Rows without ids are whole sequences, and so is each run of a negative id.
TEST(FieldCases, C4_WholeSequencesNeedNoRoom) {
  Controller controller(config_of(1)), plain(config_of(0));
  const Indices first = sequence(0), second = sequence(1), third = sequence(2);
  const auto half = [](const Indices& experts, std::size_t which) {
    return Indices(experts.begin() + static_cast<std::ptrdiff_t>(which * kLength),
                   experts.begin() + static_cast<std::ptrdiff_t>((which + 1) * kLength));
  };
  // A packed record: the end of a split sequence, two whole ones, the beginning of the same split one.
  Indices packed = half(first, 0), ids(kLength / 2, 0);
  packed.insert(packed.end(), second.begin(), second.end());
  packed.insert(packed.end(), third.begin(), third.end());
  ids.resize(ids.size() + kLength, -7);
  ids.resize(ids.size() + kLength, -1);
  const Indices rest = half(first, 1);
  packed.insert(packed.end(), rest.begin(), rest.end());
  ids.resize(ids.size() + kLength / 2, 0);
  controller.record(0, {.experts = packed, .sequence_ids = ids});
  controller.record(0, {.experts = sequence(3), .sequence_length = kLength});
  for (int s = 0; s < 4; ++s) plain.record(0, {.experts = sequence(s), .sequence_length = kLength});
  const StepReport &joined = controller.step(), &whole = plain.step();
  EXPECT_EQ(joined.layers[0].stats->scalar(RoutingStats::kSequences), 4);
  ASSERT_TRUE(whole.layers[0].metrics->sampling_floor_cv);
  EXPECT_EQ(joined.layers[0].metrics->sampling_floor_cv, whole.layers[0].metrics->sampling_floor_cv);
  EXPECT_THAT(notices_of(joined), IsEmpty());
}

TEST(FieldCases, C4_PiecesOfAStepSurviveASaveInItsMiddle) {
  const Indices experts = sequence(0), ids(kLength, 0), other = sequence(1), other_ids(kLength, 1);
  const auto piece = [&](const Indices& of, const Indices& named, std::size_t from) {
    return RoutingBatch{.experts = std::span(of).subspan(from * kTopK, kLength / 2 * kTopK),
                        .sequence_ids = std::span(named).subspan(from, kLength / 2)};
  };
  Controller through(config_of(2)), broken(config_of(2)), resumed(config_of(2));
  for (Controller* controller : {&through, &broken}) {
    controller->record(0, piece(experts, ids, 0));
    controller->record(0, piece(other, other_ids, 0));
  }
  resumed.load(broken.save());
  for (Controller* controller : {&through, &resumed}) {
    controller->record(0, piece(experts, ids, kLength / 2));
    controller->record(0, piece(other, other_ids, kLength / 2));
    controller->step();
  }
  ASSERT_TRUE(through.report().layers[0].metrics->sampling_floor_cv);
  EXPECT_EQ(resumed.report().layers[0].metrics->sampling_floor_cv,
            through.report().layers[0].metrics->sampling_floor_cv);
}

// ---- C2 in a controller and its log. ----

TEST(FieldCases, C2_AStepWithEmptySlotsIsDecidedOnAndReadBack) {
  const TempDir dir;
  ControllerConfig config = config_of(0);
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1, .center = true};
  Controller controller(config);
  std::vector<std::int64_t> sums;
  {
    RunLogWriter log(dir.path("run.jsonl"), controller.config());
    controller.set_log([&](const StepReport& report) { log.write(report); });
    Indices experts = sequence(0);
    controller.record(0, {.experts = experts});
    controller.step();
    for (std::size_t i = 1; i < experts.size(); i += 6) experts[i] = -1;
    controller.record(0, {.experts = experts});
    const StepReport& report = controller.step();
    EXPECT_THAT(notices_of(report), IsEmpty());
    EXPECT_TRUE(report.layers[0].actuators[0].reasons.empty());
    EXPECT_LT(report.layers[0].stats->assignments(), kTopK * kLength);
    const auto counts = report.layers[0].stats->counts();
    sums.assign(counts.begin(), counts.end());
    sums.push_back(report.layers[0].stats->choices_sq());
  }
  const std::string text = TempDir::read(dir.path("run.jsonl"));
  EXPECT_EQ(text.find("choices_sq"), text.rfind("choices_sq")) << "once: not where every token has k experts";
  LogReader reader(dir.path("run.jsonl"));
  EXPECT_EQ(reader.next()->stats.choices_sq(), kTopK * kTopK * kLength);
  const RoutingStats read = reader.next()->stats;
  std::vector<std::int64_t> again(read.counts().begin(), read.counts().end());
  again.push_back(read.choices_sq());
  EXPECT_THAT(again, ElementsAreArray(sums));
}

// ---- C5: recomputation without micro-batches. ----

TEST(FieldCases, C5_ARecordThatRecomputationRepeatsIsSaidOnce) {
  ControllerConfig config = config_of(0);
  config.collect.sequences = false;
  for (const bool numbered : {false, true}) {
    Controller controller(config);
    std::vector<std::string> notices;
    for (int step = 0; step < 8; ++step) {
      for (int batch = 0; batch < 2; ++batch) {
        const Indices experts = sequence(2 * step + batch);
        for (int pass = 0; pass < 2; ++pass)
          controller.record(0, {.experts = experts}, numbered ? batch : -1);
      }
      const StepReport& report = controller.step();
      EXPECT_EQ(report.layers[0].stats->tokens(), (numbered ? 2 : 4) * kLength);
      for (const std::string& notice : notices_of(report)) notices.push_back(notice);
    }
    if (numbered) {
      EXPECT_THAT(notices, IsEmpty());
    } else {
      EXPECT_THAT(notices, ElementsAre(HasSubstr("config@0: the same experts were recorded twice")));
    }
  }
}

TEST(FieldCases, C5_MicroBatchesThatAreAlikeByAccidentAreNot) {
  ControllerConfig config = config_of(0);
  config.collect.sequences = false;
  Controller controller(config);
  for (int step = 0; step < 8; ++step) {
    // All tokens to the same experts, as a router of zeros sends them; every third step, a true repeat.
    Indices same;
    for (int t = 0; t < kLength; ++t) same.insert(same.end(), {0, 1});
    const Indices experts = step % 3 == 0 ? sequence(step) : same;
    for (int batch = 0; batch < 2; ++batch) controller.record(0, {.experts = experts});
    EXPECT_THAT(notices_of(controller.step()), IsEmpty());
  }
}

}  // namespace
}  // namespace moectl
