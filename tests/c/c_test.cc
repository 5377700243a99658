// moectl.h: what every call says of wrong arguments, and that structs may grow.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "moectl.h"

namespace {

using testing::HasSubstr;
using testing::StartsWith;

constexpr char kConfig[] =
    "version: 1\nmodel: {layers: 2, experts: 4, top_k: 2}\nexpert_bias: {policy: sign_bias}\n";

class C : public testing::Test {
 protected:
  C() { EXPECT_EQ(moectl_new(kConfig, nullptr, &c_), MOECTL_OK) << moectl_error(); }
  ~C() override { moectl_free(c_); }

  void record(int layer = 0) {
    static const std::int64_t experts[] = {0, 1, 0, 2, 0, 3};
    moectl_batch batch{};
    batch.size = sizeof batch;
    batch.tokens = 3;
    batch.experts = experts;
    ASSERT_EQ(moectl_record(c_, layer, &batch, -1), MOECTL_OK) << moectl_error();
  }
  std::string state() const {
    char* bytes = nullptr;
    std::size_t size = 0;
    EXPECT_EQ(moectl_save(c_, &bytes, &size), MOECTL_OK);
    std::string copy(bytes, size);
    moectl_free_text(bytes);
    return copy;
  }

  moectl_controller* c_ = nullptr;
  int calls_ = 0;
};

TEST_F(C, WrongConfigsHaveCodeAndWords) {
  moectl_controller* none = c_;
  EXPECT_EQ(moectl_new("version: 2\n", "file.yaml", &none), MOECTL_CONFIG);
  EXPECT_EQ(none, nullptr);
  EXPECT_THAT(moectl_error(), StartsWith("file.yaml:1:10: version: 2: must be 1"));
  EXPECT_EQ(moectl_new_from_file("/nowhere.yaml", &none), MOECTL_CONFIG);
  EXPECT_EQ(moectl_new(nullptr, nullptr, &none), MOECTL_INVALID);
  EXPECT_EQ(moectl_new(kConfig, nullptr, nullptr), MOECTL_INVALID);
}

template <class Result, class... Arguments>
auto callback_like(Result (*)(Arguments...)) {
  return +[](Arguments...) -> Result { return 0; };
}

/// Zero or NULL; or, if `given`, an address of something, as of a struct with its size.
template <class T>
T argument(bool given) {
  if constexpr (!std::is_pointer_v<T>) {
    return T{};
  } else if constexpr (std::is_function_v<std::remove_pointer_t<T>>) {
    return given ? callback_like(T{}) : nullptr;
  } else {
    alignas(16) static unsigned char some[4096];
    const std::size_t size = sizeof some;
    std::memcpy(some, &size, sizeof size);
    return given ? reinterpret_cast<T>(some) : nullptr;
  }
}

template <class Handle, class... Arguments>
int called_without_controller(int (*function)(Handle*, Arguments...), bool given) {
  return function(nullptr, argument<Arguments>(given)...);
}

// Every function of the header that takes a controller, whatever its other arguments are.
TEST(WithoutController, EveryCallIsRefusedBeforeItDoesAnything) {
  int calls = 0;
  for (const bool given : {false, true}) {
#define MOECTL_CALL(function)                                                                        \
  moectl_freeze(nullptr, 0, 0);                                                                      \
  EXPECT_EQ(called_without_controller(function, given), MOECTL_INVALID) << #function;                \
  EXPECT_STREQ(moectl_error(), "controller: NULL: must be one that moectl_new() made") << #function; \
  ++calls;
#include "c_functions.inc"
#undef MOECTL_CALL
  }
  EXPECT_GT(calls, 50);
}

TEST_F(C, TheLastErrorOutlivesGoodCallsAndTheirCallbacks) {
  ASSERT_EQ(moectl_set_reduction(
                c_, [](void*, std::int64_t*, std::size_t) { return moectl_set_error("not asked for"), 0; },
                nullptr),
            MOECTL_OK);
  ASSERT_EQ(moectl_freeze(c_, 9, 1), MOECTL_INVALID);
  const std::string said = moectl_error();
  record();
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  EXPECT_EQ(moectl_error(), said);
  // Words of an earlier call are not those of a later one.
  ASSERT_EQ(moectl_set_reduction(
                c_, [](void*, std::int64_t*, std::size_t) { return 3; }, nullptr),
            MOECTL_OK);
  EXPECT_EQ(moectl_step(c_, nullptr), MOECTL_REDUCTION);
  EXPECT_THAT(moectl_error(), AllOf(HasSubstr("returned 3"), Not(HasSubstr("not asked for"))));
}

TEST_F(C, ANoticeIsOfALayerThatIsThere) {
  EXPECT_EQ(moectl_say(c_, "nonsense", 0, "x"), MOECTL_INVALID);
  EXPECT_THAT(moectl_error(), StartsWith("kind: nonsense: must be one of invalid, missing_input, "));
  EXPECT_EQ(moectl_say(c_, "wiring", 2, "x"), MOECTL_INVALID);
  EXPECT_EQ(moectl_say(c_, "wiring", -2, "x"), MOECTL_INVALID);
  EXPECT_EQ(moectl_say(c_, "wiring", -1, "of none"), MOECTL_OK);
  EXPECT_EQ(moectl_say(c_, "wiring", 1, "of a layer"), MOECTL_OK);
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  moectl_figures figures{};
  figures.size = sizeof figures;
  ASSERT_EQ(moectl_figures_of(c_, &figures), MOECTL_OK);
  EXPECT_EQ(figures.notices, 2);
  char* json = nullptr;
  ASSERT_EQ(moectl_report_json(c_, 0, &json), MOECTL_OK);
  EXPECT_THAT(json, AllOf(HasSubstr("of none"), HasSubstr("of a layer")));
  moectl_free_text(json);
  EXPECT_EQ(moectl_record_value(c_, 0, "nothing", 1), MOECTL_INVALID);
  EXPECT_THAT(moectl_error(), HasSubstr("must be one of balance_loss, z_loss, "));
}

TEST_F(C, NoNullIsFollowed) {
  EXPECT_EQ(moectl_record(c_, 0, nullptr, -1), MOECTL_INVALID);
  EXPECT_EQ(moectl_record_counts(c_, 0, nullptr, 4, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_check_choices(c_, 0, 1, nullptr, nullptr, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_say(c_, nullptr, 0, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_figures_of(c_, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_report_json(c_, 0, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_biases(c_, 0, nullptr, 4), MOECTL_INVALID);
  EXPECT_EQ(moectl_deployment_biases(c_, 0, nullptr, 4), MOECTL_INVALID);
  EXPECT_EQ(moectl_temperature(c_, 0, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_record_value(c_, 0, nullptr, 1), MOECTL_INVALID);
  EXPECT_EQ(moectl_log_to_file(c_, nullptr, 0), MOECTL_INVALID);
  EXPECT_EQ(moectl_save(c_, nullptr, nullptr), MOECTL_INVALID);
  EXPECT_EQ(moectl_load(c_, nullptr, 0, 0, nullptr), MOECTL_INVALID);
  moectl_set_error(nullptr);
  moectl_free_text(nullptr);
  moectl_free(nullptr);
}

TEST_F(C, UnknownLayersAndSizesThatDoNotFit) {
  std::array<double, 8> values{};
  EXPECT_EQ(moectl_freeze(c_, 2, 1), MOECTL_INVALID);
  EXPECT_EQ(moectl_biases(c_, 0, values.data(), 8), MOECTL_INVALID);
  EXPECT_THAT(moectl_error(), HasSubstr("bias: 8 values: must be 4"));
  EXPECT_EQ(moectl_biases(c_, MOECTL_ALL_LAYERS, values.data(), 8), MOECTL_OK);
  EXPECT_EQ(moectl_biases(c_, 5, values.data(), 4), MOECTL_INVALID);
  const std::int64_t experts[] = {0, 1};
  const std::int32_t narrow[] = {0, 1};
  moectl_batch batch{};
  batch.tokens = 1;
  batch.experts = experts;
  EXPECT_EQ(moectl_record(c_, 0, &batch, -1), MOECTL_INVALID);
  EXPECT_THAT(moectl_error(), HasSubstr("batch.size: 0: must be the sizeof of the struct"));
  batch.size = sizeof batch;
  batch.experts32 = narrow;
  EXPECT_EQ(moectl_record(c_, 0, &batch, -1), MOECTL_INVALID);
  batch.experts = nullptr;
  EXPECT_EQ(moectl_record(c_, 2, &batch, -1), MOECTL_INVALID);
  EXPECT_EQ(moectl_record(c_, 0, &batch, -1), MOECTL_OK);
}

// A program compiled against a shorter struct: what lies behind it is not its memory.
TEST_F(C, StructsMayGrow) {
  record();
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  moectl_figures figures;
  std::memset(&figures, 0xee, sizeof figures);
  figures.size = offsetof(moectl_figures, max_vio);
  ASSERT_EQ(moectl_figures_of(c_, &figures), MOECTL_OK);
  EXPECT_EQ(figures.size, offsetof(moectl_figures, max_vio));
  EXPECT_EQ(figures.tokens, 3);
  double untouched;
  std::memset(&untouched, 0xee, sizeof untouched);
  EXPECT_EQ(std::memcmp(&figures.max_vio, &untouched, sizeof untouched), 0);

  struct {
    moectl_step_info info;
    char more[64];
  } later{};
  later.info.size = sizeof later;
  EXPECT_EQ(moectl_step(c_, &later.info), MOECTL_OK);
}

TEST_F(C, CountsWithoutTokensAreAsManyAsTheyNeed) {
  const std::int64_t counts[] = {3, 1, 1, 1, 2, 2, 2, 1};
  ASSERT_EQ(moectl_record_counts(c_, MOECTL_ALL_LAYERS, counts, 8, nullptr), MOECTL_OK);
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  char* json = nullptr;
  ASSERT_EQ(moectl_report_json(c_, 1, &json), MOECTL_OK);
  EXPECT_THAT(json, HasSubstr("\"counts\":[3,1,1,1]"));
  EXPECT_THAT(json, HasSubstr("\"tokens\":3"));
  EXPECT_THAT(json, HasSubstr("\"tokens\":4"));
  EXPECT_THAT(json, testing::EndsWith("}]"));
  moectl_free_text(json);
}

// The count is what is wrong, not the tokens that follow from it.
TEST_F(C, ACountThatCannotBeIsNamed) {
  const std::int64_t counts[] = {-1, 0, 0, 0, 1, 1, 1, 1};
  ASSERT_EQ(moectl_record_counts(c_, MOECTL_ALL_LAYERS, counts, 8, nullptr), MOECTL_OK);
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  char* json = nullptr;
  ASSERT_EQ(moectl_report_json(c_, 1, &json), MOECTL_OK);
  EXPECT_THAT(json, HasSubstr("counts[0] = -1: must be"));
  EXPECT_THAT(json, testing::Not(HasSubstr("tokens =")));
  moectl_free_text(json);
}

TEST_F(C, AReductionThatFailsChangesNothing) {
  record();
  ASSERT_EQ(moectl_set_reduction(
                c_, [](void*, std::int64_t*, std::size_t) { return 7; }, nullptr),
            MOECTL_OK);
  const std::string before = state();
  EXPECT_EQ(moectl_step(c_, nullptr), MOECTL_REDUCTION);
  EXPECT_THAT(moectl_error(), HasSubstr("reduction callback returned 7"));
  EXPECT_EQ(state(), before);
  ASSERT_EQ(moectl_set_reduction(
                c_, [](void* calls, std::int64_t*, std::size_t) { return ++*static_cast<int*>(calls), 0; },
                &calls_),
            MOECTL_OK);
  EXPECT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  EXPECT_EQ(calls_, 2);  // the first step also asks whether ranks have the same config
}

TEST_F(C, MessagesBelongToTheirThread) {
  EXPECT_EQ(moectl_freeze(c_, 9, 1), MOECTL_INVALID);
  const std::string mine = moectl_error();
  std::thread([] {
    EXPECT_STREQ(moectl_error(), "");
    EXPECT_EQ(moectl_hold(nullptr, 1), MOECTL_INVALID);
  }).join();
  EXPECT_EQ(moectl_error(), mine);
}

TEST_F(C, AStateThatCannotBeLoadedChangesNothing) {
  record();
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  const std::string saved = state();
  EXPECT_EQ(moectl_load(c_, saved.data(), saved.size() - 1, MOECTL_EVERYTHING, nullptr), MOECTL_STATE);
  EXPECT_EQ(state(), saved);
  EXPECT_EQ(moectl_load(c_, saved.data(), saved.size(), MOECTL_EVERYTHING, nullptr), MOECTL_OK);
  EXPECT_EQ(state(), saved);
}

TEST_F(C, LayersThatDifferHaveTheModelsIds) {
  moectl_controller* c = nullptr;
  ASSERT_EQ(moectl_new("version: 1\nmodel: {layers: 2, experts: 4, top_k: 1}\n"
                       "layers: [{ids: [3]}, {ids: [7], experts: 2}]\nexpert_bias: {policy: sign_bias}\n",
                       nullptr, &c),
            MOECTL_OK)
      << moectl_error();
  int ids[2] = {};
  ASSERT_EQ(moectl_layers(c, ids, 2, nullptr), MOECTL_OK);
  EXPECT_THAT(ids, testing::ElementsAre(3, 7));
  const std::int64_t counts[] = {4, 2, 1, 1, 5, 3};
  EXPECT_EQ(moectl_record_counts(c, MOECTL_ALL_LAYERS, counts, 8, nullptr), MOECTL_INVALID);
  ASSERT_EQ(moectl_record_counts(c, MOECTL_ALL_LAYERS, counts, 6, nullptr), MOECTL_OK);
  ASSERT_EQ(moectl_step(c, nullptr), MOECTL_OK);
  double all[6] = {}, seven[2] = {};
  ASSERT_EQ(moectl_biases(c, MOECTL_ALL_LAYERS, all, 6), MOECTL_OK);
  ASSERT_EQ(moectl_biases(c, 7, seven, 2), MOECTL_OK);
  EXPECT_LT(seven[0], seven[1]);
  EXPECT_EQ(all[4], seven[0]);
  EXPECT_EQ(moectl_freeze(c, 0, 1), MOECTL_INVALID);
  unsigned char plans[2] = {};
  EXPECT_EQ(moectl_plans(c, plans, 1), MOECTL_INVALID);
  EXPECT_EQ(moectl_plans(c, nullptr, 2), MOECTL_INVALID);
  ASSERT_EQ(moectl_freeze(c, 7, 1), MOECTL_OK);
  ASSERT_EQ(moectl_plans(c, plans, 2), MOECTL_OK);
  EXPECT_THAT(plans, testing::ElementsAre(MOECTL_DECIDED | MOECTL_EVER_MOVES,
                                          MOECTL_FROZEN | MOECTL_DECIDED | MOECTL_EVER_MOVES));
  moectl_free(c);
}

TEST_F(C, BiasesFromElsewhereAreInForceAtOnce) {
  const double foreign[] = {0.25, -0.5, 0.125, 0.125};
  ASSERT_EQ(moectl_adopt(c_, 1, foreign, 4), MOECTL_OK) << moectl_error();
  std::array<double, 8> all{};
  ASSERT_EQ(moectl_biases(c_, MOECTL_ALL_LAYERS, all.data(), 8), MOECTL_OK);
  EXPECT_THAT(all, testing::ElementsAre(0, 0, 0, 0, 0.25, -0.5, 0.125, 0.125));
  EXPECT_EQ(moectl_adopt(c_, 1, foreign, 3), MOECTL_INVALID);
  const double far[] = {1e9, 0, 0, 0};
  EXPECT_EQ(moectl_adopt(c_, 1, far, 4), MOECTL_INVALID);
}

TEST_F(C, ALayersStateGoesToAnotherSplit) {
  record(1);
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  char* bytes = nullptr;
  std::size_t size = 0;
  ASSERT_EQ(moectl_save_layer(c_, 1, &bytes, &size), MOECTL_OK) << moectl_error();
  moectl_controller* other = nullptr;
  ASSERT_EQ(moectl_new("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\nlayers: [{ids: [1]}]\n"
                       "expert_bias: {policy: sign_bias}\n",
                       nullptr, &other),
            MOECTL_OK);
  char* kept = nullptr;
  ASSERT_EQ(moectl_load_layer(other, 1, bytes, size, MOECTL_WHAT_FITS, &kept), MOECTL_OK) << moectl_error();
  EXPECT_THAT(kept, HasSubstr("\"fate\":\"kept\""));
  std::array<double, 4> here{}, there{};
  ASSERT_EQ(moectl_biases(c_, 1, here.data(), 4), MOECTL_OK);
  ASSERT_EQ(moectl_biases(other, 1, there.data(), 4), MOECTL_OK);
  EXPECT_NE(here[0], 0);
  EXPECT_EQ(here, there);
  EXPECT_EQ(moectl_load_layer(other, 1, bytes, size, 5, nullptr), MOECTL_INVALID);
  moectl_free_text(kept);
  moectl_free_text(bytes);
  moectl_free(other);
}

TEST_F(C, ALogReceivesItsHeaderAndThenEachStep) {
  std::vector<std::string> got;
  const auto log = [](void* to, const char* text, std::size_t size) {
    static_cast<std::vector<std::string>*>(to)->emplace_back(text, size);
    return 0;
  };
  ASSERT_EQ(moectl_set_log(c_, log, &got), MOECTL_OK);
  ASSERT_EQ(got.size(), 1U);
  EXPECT_THAT(got[0], StartsWith("{\"format\":\"moectl-run\""));
  record();
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  ASSERT_EQ(got.size(), 2U);
  EXPECT_THAT(got[1], StartsWith("{\"step\":0,\"layer\":0"));
  ASSERT_EQ(moectl_set_log(c_, nullptr, nullptr), MOECTL_OK);
  ASSERT_EQ(moectl_step(c_, nullptr), MOECTL_OK);
  EXPECT_EQ(got.size(), 2U);
}

}  // namespace
