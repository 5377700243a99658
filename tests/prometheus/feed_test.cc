// What the endpoint says, by hand; that promtool takes it; and that Prometheus itself scrapes it and fires an
// alert.
#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "allocation_counter.h"
#include "moectl/prometheus.h"
#include "process.h"
#include "test_paths.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

/// Two layers of four experts, of which the second decides.
ControllerConfig small_config() {
  return parse_config(
      "version: 1\n"
      "model: {layers: 2, experts: 4, top_k: 1}\n"
      "expert_bias: {policy: sign_bias, options: {step: 0.5, zero_mean_move: false},"
      " limits: {rate: 0.25, min: -0.5, max: 0.5, center: false}}\n"
      "aux_loss_weight: {policy: fixed, initial: 0.01, scope: model}\n"
      "health: {alerts: [{metric: max_vio, above: 1, name: 'too \"high\"'}]}\n");
}

void record(Controller& controller, int layer, std::vector<std::int64_t> counts) {
  RoutingStats stats(controller.shape(0));
  std::int64_t sum = 0;
  for (const std::int64_t count : counts) sum += count;
  stats.add_counts(counts, sum);
  controller.record(layer, stats);
}

/// The value of a sample, by its whole name with labels; NaN if it is not there.
double sample(const std::string& text, const std::string& name) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(name + ' ')) return std::stod(line.substr(name.size() + 1));
  }
  return std::nan("");
}

// What the header promises to the training loop. Alerts, health and reasons come and go.
TEST(PrometheusFeed, DoesNotAllocateInTheSteadyState) {
  Controller controller(small_config());
  PrometheusFeed feed("127.0.0.1:0");
  std::int64_t allocated = 0;
  controller.set_log(
      [&](const StepReport& report) { allocated += testing::allocations_of([&] { feed.write(report); }); });
  std::int64_t before = 0;
  for (int step = 0; step < 400; ++step) {
    if (step == 200) before = allocated;
    record(controller, 0, {step % 50 < 20 ? 90 : 25, 25, 25, 25});
    record(controller, 1, {25, 25, 25, step % 40 < 30 ? 0 : 25});
    controller.step({.loss = 2.5});
  }
  EXPECT_GT(before, 0);  // it does count
  EXPECT_EQ(allocated, before);
  EXPECT_DOUBLE_EQ(sample(feed.text(), "moectl_steps_total"), 400);
}

TEST(PrometheusFeed, ShowsTheValuesOfTheSteps) {
  Controller controller(small_config());
  PrometheusFeed feed("127.0.0.1:0");
  controller.set_log([&](const StepReport& report) { feed.write(report); });
  record(controller, 0, {70, 10, 10, 10});
  record(controller, 1, {25, 25, 25, 25});
  controller.step({.loss = 2.5});
  record(controller, 0, {40, 20, 20, 20});
  record(controller, 1, {25, 25, 25, 25});
  controller.step({.loss = 2.25});

  const std::string text = http_get(feed.port(), "/metrics");
  EXPECT_THAT(text, HasSubstr(feed.text()));
  const auto is = [&](const char* name, double value) {
    EXPECT_DOUBLE_EQ(sample(text, name), value) << name;
  };
  is("moectl_step", 1);
  is("moectl_steps_total", 2);
  is("moectl_loss", 2.25);
  is("moectl_log_faults_total", 0);
  is(R"(moectl_tokens_total{layer="0"})", 200);
  is(R"(moectl_expert_assignments_total{layer="0",expert="0"})", 110);
  is(R"(moectl_expert_assignments_total{layer="1",expert="3"})", 50);
  is(R"(moectl_expert_load_ratio{layer="0",expert="0"})", 1.6);
  is(R"(moectl_max_vio{layer="0"})", 0.6);
  is(R"(moectl_max_vio{layer="1"})", 0);
  is(R"(moectl_max_load_ratio{layer="0"})", 0.4);
  // load_std is in percentage points: 100 · std(.4, .2, .2, .2).
  is(R"(moectl_load_std_ratio{layer="0"})", std::sqrt((0.15 * 0.15 + 3 * 0.05 * 0.05) / 4));
  is(R"(moectl_entropy_nats{layer="1"})", std::log(4.0));
  // Moves of 0.5 wanted, 0.25 each allowed; the second wants to leave the range.
  is(R"(moectl_expert_bias{layer="0",expert="0"})", -0.5);
  is(R"(moectl_expert_bias{layer="0",expert="1"})", 0.5);
  is(R"(moectl_expert_bias_largest{layer="0"})", 0.5);
  is(R"(moectl_actuator_reasons_total{layer="0",actuator="expert_bias",reason="rate"})", 1);
  is(R"(moectl_actuator_reasons_total{layer="0",actuator="expert_bias",reason="range"})", 1);
  is(R"(moectl_actuator_reasons_total{layer="1",actuator="expert_bias",reason="rate"})", 0);
  is(R"(moectl_actuator_value{layer="model",actuator="aux_loss_weight"})", 0.01);
  // A quote within a name is escaped.
  is(R"(moectl_alert{layer="0",alert="too \"high\""})", 1);
  double states = 0;
  for (int h = 0; h < kHealthCount; ++h) {
    states += sample(
        text, R"(moectl_health{layer="0",state=")" + std::string(name_of(static_cast<Health>(h))) + "\"}");
  }
  EXPECT_EQ(states, 1);
  EXPECT_GT(sample(text, "moectl_last_record_timestamp_seconds"), 1.7e9);
  // An alert that is lifted comes down to 0 instead of going away.
  for (int step = 0; step < 100; ++step) {
    record(controller, 0, {25, 25, 25, 25});
    controller.step();
  }
  EXPECT_EQ(sample(feed.text(), R"(moectl_alert{layer="0",alert="too \"high\""})"), 0);
  // What is not known is not there.
  EXPECT_THAT(text, Not(HasSubstr("moectl_dropped_assignments_total")));
  EXPECT_THAT(text, Not(HasSubstr("moectl_latency")));
}

// Twenty tokens {0, 1}, twenty {2, 3}, of four experts: each pair has twice the tokens that chance gives.
TEST(PrometheusFeed, ThePairsThatTokensChooseMostAreAsManyAsTheUserWants) {
  ControllerConfig config = small_config();
  config.model.layers = 1;
  config.model.top_k = 2;
  config.collect.pairs = true;
  Controller controller(config);
  PrometheusFeed one("127.0.0.1:0", {.metrics = {"pair_lift"}, .extremes = 1}),
      all("127.0.0.1:0", {.metrics = {"pair_lift"}});
  std::int64_t allocated = 0;
  controller.set_log([&](const StepReport& report) {
    allocated = testing::allocations_of([&] { one.write(report); });
    all.write(report);
  });
  std::vector<std::int64_t> experts;
  for (int i = 0; i < 20; ++i) experts.insert(experts.end(), {0, 1, 3, 2});
  for (int step = 0; step < 3; ++step) {
    controller.record(0, {.experts = experts});
    controller.step();
  }
  EXPECT_EQ(allocated, 0);  // in the last
  const std::string text = one.text();
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_pair_lift{layer="0"})"), 2);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_pair_extreme_ratio{layer="0",rank="1"})"), 2);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_pair_extreme_first_expert{layer="0",rank="1"})"), 0);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_pair_extreme_second_expert{layer="0",rank="1"})"), 1);
  EXPECT_THAT(text, Not(HasSubstr(R"(rank="2"})")));
  EXPECT_DOUBLE_EQ(sample(all.text(), R"(moectl_pair_lift{layer="0"})"), 2);
  EXPECT_THAT(all.text(), Not(HasSubstr("pair_extreme")));
}

TEST(PrometheusFeed, AUserChoosesHowManySeries) {
  Controller controller(small_config());
  PrometheusFeed all("127.0.0.1:0"),
      few("127.0.0.1:0", {.metrics = {"max_vio", "balancedness"}, .extremes = 1});
  controller.set_log([&](const StepReport& report) {
    all.write(report);
    few.write(report);
  });
  record(controller, 0, {70, 10, 5, 15});
  record(controller, 1, {25, 25, 25, 25});
  controller.step();
  const std::string text = few.text();
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_load_extreme_ratio{layer="0",end="most",rank="1"})"), 2.8);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_load_extreme_expert{layer="0",end="most",rank="1"})"), 0);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_load_extreme_ratio{layer="0",end="least",rank="1"})"), 0.2);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_load_extreme_expert{layer="0",end="least",rank="1"})"), 2);
  EXPECT_DOUBLE_EQ(sample(text, R"(moectl_balancedness{layer="0"})"), 1 / 2.8);
  EXPECT_THAT(text, Not(HasSubstr("moectl_gini")));
  EXPECT_THAT(text, Not(HasSubstr("expert=")));
  EXPECT_THAT(all.text(), HasSubstr("moectl_gini"));
  EXPECT_THAT(all.text(), Not(HasSubstr("extreme")));
  EXPECT_THROW(PrometheusFeed("127.0.0.1:0", {.metrics = {"max_voi"}}), std::invalid_argument);
  EXPECT_THROW(PrometheusFeed("127.0.0.1:0", {.extremes = -2}), std::invalid_argument);
}

// Numbers that the host measures itself: chosen by name, there where they were recorded.
TEST(PrometheusFeed, ServesWhatTheHostMeasured) {
  const std::pair<const char*, double> values[] = {{"balance_loss", 1.5},       {"z_loss", 9},
                                                   {"router_similarity", 0.25}, {"router_condition", 3},
                                                   {"expert_output_norm", 2},   {"gradient_ratio", 0.125}};
  PrometheusOptions options{.metrics = {}, .extremes = 0};
  for (const auto& [name, value] : values) options.metrics.emplace_back(name);
  Controller controller(small_config());
  PrometheusFeed feed("127.0.0.1:0", options);
  controller.set_log([&](const StepReport& report) { feed.write(report); });
  for (int layer = 0; layer < 2; ++layer) record(controller, layer, {25, 25, 25, 25});
  controller.record_with(1, [&](RoutingStats& stats) {
    for (const auto& [name, value] : values) EXPECT_TRUE(stats.add_value(name, value)) << name;
  });
  controller.step();
  for (const auto& [name, value] : values) {
    const std::string metric = std::string("moectl_") + name;
    EXPECT_DOUBLE_EQ(sample(feed.text(), metric + R"({layer="1"})"), value) << feed.text();
    EXPECT_TRUE(std::isnan(sample(feed.text(), metric + R"({layer="0"})"))) << name;
  }
  EXPECT_THAT(feed.text(), Not(HasSubstr("moectl_max_vio")));
}

TEST(PrometheusFeed, ARecordOfALogGivesTheSame) {
  const TempDir dir;
  Controller controller(small_config());
  PrometheusFeed live("127.0.0.1:0"), read("127.0.0.1:0");
  {
    RunLogWriter writer(dir.path("run.jsonl"), controller.config());
    controller.set_log([&](const StepReport& report) {
      live.write(report);
      writer.write(report);
      writer.write(report, "validation");
    });
    for (int step = 0; step < 5; ++step) {
      record(controller, 0, {70, 10, 10, 10 * step});
      record(controller, 1, {25, 25, 25, 25});
      controller.step({.loss = 2.5});
    }
  }
  LogReader log(dir.path("run.jsonl"));
  while (const auto line = log.next()) {
    Metrics metrics;
    for (const auto& [name, value] : line->metrics) metrics.*find_metric(name)->value = value;
    read.write(*line, metrics);
  }
  const auto without_time = [](const std::string& text) {
    const std::size_t at = text.find("\nmoectl_last_record_timestamp_seconds ");
    return text.substr(0, at) + text.substr(text.find('\n', at + 1));
  };
  EXPECT_TRUE(without_time(read.text()) == without_time(live.text())) << read.text() << live.text();
}

TEST(PrometheusFeed, ShowsTheResponseOfTheLoad) {
  PrometheusFeed feed("127.0.0.1:0");
  LogRecord logged;
  logged.layer = 0;
  feed.write(logged, Metrics());
  EXPECT_THAT(feed.text(), Not(HasSubstr("moectl_response")));
  logged.responsiveness = {.state = Response::kUnknown};
  feed.write(logged, Metrics());
  EXPECT_EQ(sample(feed.text(), R"(moectl_response{layer="0",actuator="expert_bias",state="unknown"})"), 1);
  EXPECT_THAT(feed.text(), Not(HasSubstr("moectl_response_gain_ratio")));
  logged.responsiveness = {.state = Response::kAnswers, .gain = 0.75, .error = 0.125, .scaled = true};
  feed.write(logged, Metrics());
  const std::string text = feed.text();
  EXPECT_EQ(sample(text, R"(moectl_response{layer="0",actuator="expert_bias",state="unknown"})"), 0);
  EXPECT_EQ(sample(text, R"(moectl_response{layer="0",actuator="expert_bias",state="answers"})"), 1);
  EXPECT_EQ(sample(text, R"(moectl_response_gain_ratio{layer="0",actuator="expert_bias"})"), 0.75);
  EXPECT_EQ(sample(text, R"(moectl_response_gain_error_ratio{layer="0",actuator="expert_bias"})"), 0.125);
  EXPECT_THAT(text, Not(HasSubstr(R"(moectl_response{layer="0",actuator="router_temperature")")));
  logged.actuators["router_temperature"].responsiveness = {
      .state = Response::kUnresponsive, .gain = -1, .error = 0.5};
  feed.write(logged, Metrics());
  EXPECT_EQ(
      sample(feed.text(), R"(moectl_response{layer="0",actuator="router_temperature",state="unresponsive"})"),
      1);
  EXPECT_EQ(sample(feed.text(), R"(moectl_response_gain_ratio{layer="0",actuator="router_temperature"})"),
            -1);
}

TEST(PrometheusFeed, CountsNotices) {
  Controller controller(small_config());
  PrometheusFeed feed("127.0.0.1:0");
  controller.set_log([&](const StepReport& report) { feed.write(report); });
  for (int step = 0; step < 3; ++step) {
    record(controller, 0, {25, 25, 25, 25});
    record(controller, 1, {25, 25, -25, 25});
    controller.step();
  }
  EXPECT_EQ(sample(feed.text(), R"(moectl_notices_total{layer="1",kind="invalid"})"), 3);
  // The zero before the first one, without which no increase is seen.
  EXPECT_EQ(sample(feed.text(), R"(moectl_notices_total{layer="0",kind="unresponsive"})"), 0);
  EXPECT_EQ(sample(feed.text(), R"(moectl_notices_total{layer="model",kind="config"})"), 0);
  LogRecord logged;
  logged.notices = {{.kind = "config", .text = "", .step = 0}};
  feed.write(logged, Metrics());
  EXPECT_EQ(sample(feed.text(), R"(moectl_notices_total{layer="model",kind="config"})"), 1);
}

TEST(PrometheusFeed, InvalidAddressesAndUsedPorts) {
  for (const char* address :
       {"", "localhost:9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:9464,9465",
        "127.0.0.1:443s", "127.0.0.1:-1", "999.999.999.999:0", "127.1:0", "0x7f.0.0.1:0", "1.2.3.4.5:0",
        "127.0.0.1 :0", "::1:0", "[::1:0", "[::g]:0", "[127.0.0.1]:0", "70000", "-1"}) {
    EXPECT_THROW(PrometheusFeed{address}, std::invalid_argument) << address;
  }
  PrometheusFeed feed("127.0.0.1:0");
  const std::string taken = "127.0.0.1:" + std::to_string(feed.port());
  EXPECT_THAT([&] { PrometheusFeed{taken}; },
              ::testing::ThrowsMessage<std::runtime_error>(HasSubstr(taken + ": cannot be listened at")));
}

// By default nobody but this machine is served.
TEST(PrometheusFeed, APortAloneIsOneOfTheLoopbackAddress) {
  PrometheusFeed feed("0");
  EXPECT_THAT(http_get(feed.port(), "/metrics"), HasSubstr("moectl_steps_total"));
}

/// Connections to the endpoint of which none asks anything.
struct Silent {
  Silent(int port, int count) {
    for (int i = 0; i < count; ++i) connections.push_back(connect_to(port));
  }
  ~Silent() {
    for (const int connection : connections) close(connection);
  }
  std::vector<int> connections;
};

// Connections that idle, and requests that never end, hold up a scrape for a second or two. The bound is far from that, for
// a machine that is busy; where each is waited for, the answer takes minutes.
TEST(PrometheusFeed, AnswersWhileOthersIdleOrTrickle) {
  PrometheusFeed feed("127.0.0.1:0");
  const auto seconds = [&] {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_THAT(http_get(feed.port(), "/metrics"), HasSubstr("moectl_steps_total"));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  {
    const Silent idle(feed.port(), 48);
    EXPECT_LT(seconds(), 25);
  }
  // Heads, and bodies with and without a length, that come a byte at a time and never end.
  for (const std::string start :
       {"GET /metrics HTTP/1.1\r\nX: ",
        "GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3b9aca00\r\n",
        "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"}) {
    SCOPED_TRACE(start);
    const Silent trickling(feed.port(), 48);
    std::atomic<bool> done = false;
    std::thread writer([&] {
      for (const int connection : trickling.connections)
        send(connection, start.data(), start.size(), MSG_NOSIGNAL);
      while (!done) {
        for (const int connection : trickling.connections) send(connection, "a", 1, MSG_NOSIGNAL);
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
      }
    });
    EXPECT_LT(seconds(), 25);
    EXPECT_LT(seconds(), 25);
    done = true;
    writer.join();
  }
}

/// The first line of the answer to a request.
std::string first_line(int port, const std::string& request) {
  const int connection = connect_to(port);
  EXPECT_EQ(send(connection, request.data(), request.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(request.size()));
  std::string answer(256, '\0');
  answer.resize(
      static_cast<std::size_t>(std::max<ssize_t>(0, read(connection, answer.data(), answer.size()))));
  close(connection);
  return answer.substr(0, answer.find("\r\n"));
}

TEST(PrometheusFeed, AnswersNoRequestWithABody) {
  PrometheusFeed feed("127.0.0.1:0");
  const auto answer = [&](const std::string& field) {
    return first_line(feed.port(), "GET /metrics HTTP/1.1\r\nHost: x\r\n" + field + "\r\n\r\n");
  };
  EXPECT_EQ(answer("Accept: */*"), "HTTP/1.1 200 OK");
  EXPECT_EQ(answer("Content-Length: 0"), "HTTP/1.1 200 OK");
  for (const char* body : {"Content-Length: 1", "Content-Length: 00", "content-length: 1000000000",
                           "Content-Length: -1", "Transfer-Encoding: chunked", "Transfer-Encoding: identity",
                           "Content-Length: 0\r\nTransfer-Encoding: chunked"})
    EXPECT_THAT(answer(body), HasSubstr(" 4")) << body;
}

TEST(PrometheusFeed, AnswersNothingButGet) {
  PrometheusFeed feed("127.0.0.1:0");
  for (const char* method : {"HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH",
                             "PROPFIND", "MKCOL", "GETT", "get", "\x16\x03\x01"}) {
    const std::string answer =
        first_line(feed.port(), std::string(method) + " /metrics HTTP/1.0\r\nHost: x\r\n\r\n");
    EXPECT_TRUE(answer.empty() || answer.substr(8, 2) == " 4") << method << ": " << answer;
  }
  for (const char* path : {"/", "/metricsfoo", "/metrics/", "/metrics/x", "/Metrics", "//metrics/.."})
    EXPECT_EQ(first_line(feed.port(), std::string("GET ") + path + " HTTP/1.0\r\n\r\n"),
              "HTTP/1.0 404 Not Found")
        << path;
  EXPECT_EQ(http_get(feed.port(), "/../../../../etc/passwd"), "");
  EXPECT_THAT(http_get(feed.port(), "/metrics"), HasSubstr("moectl_steps_total"));
}

TEST(PrometheusFeed, ScrapesWhileStepsAreWritten) {
  Controller controller(small_config());
  PrometheusFeed feed("127.0.0.1:0");
  controller.set_log([&](const StepReport& report) { feed.write(report); });
  std::atomic<bool> done = false;
  std::thread scraper([&] {
    double last = 0;
    do {
      const std::string text = feed.text();
      const double steps = sample(text, "moectl_steps_total");
      EXPECT_GE(steps, last);
      // All layers of a step at once.
      if (steps == 0) continue;
      EXPECT_EQ(sample(text, R"(moectl_tokens_total{layer="0"})"), 100 * steps);
      EXPECT_EQ(sample(text, R"(moectl_tokens_total{layer="1"})"), 100 * steps);
      last = steps;
    } while (!done);
  });
  for (int step = 0; step < 300; ++step) {
    record(controller, 0, {70, 10, 10, 10});
    record(controller, 1, {25, 25, 25, 25});
    controller.step();
  }
  done = true;
  scraper.join();
}

// ---- Debian's Prometheus. ----

#define NEED_PROGRAM(variable, name)               \
  const std::string variable = find_program(name); \
  if (variable.empty()) GTEST_SKIP() << name " is not in the PATH: Debian's package 'prometheus' has it"

/// A log of a serving router: drops, domains, an alert, a collapsed layer, an actuator at its limits.
std::string serving_log(int from, int to) {
  std::string text;
  if (from == 0) {
    text = R"({"format":"moectl-run","version":1,"config":{"model":{"layers":2,"experts":4,"top_k":1}}})"
           "\n";
  }
  for (int step = from; step < to; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      const char* counts = layer == 0 ? "[25,25,26,24]" : "[97,1,1,1]";
      text += R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(layer) +
              R"(,"tokens":100,"top_k":1,"loss":2.5,"dropped":10,"counts":)" + counts + R"(,"health":")" +
              (layer == 0 ? "healthy" : "collapsed") + R"(","alerts":)" +
              (layer == 0 ? "[]" : R"(["expert_collapse"])") +
              R"(,"actuators":{"expert_bias":{"applied":[-1,0,0,1],"reasons":["range"]},)"
              R"("aux_loss_weight":{"applied":[0.05],"reasons":["cadence"]}}})"
              "\n";
    }
  }
  return text;
}

TEST(Promtool, AcceptsTheMetricsWithoutAWarning) {
  NEED_PROGRAM(promtool, "promtool");
  const TempDir dir;
  dir.write("run.jsonl", serving_log(0, 5));
  PrometheusFeed feed("127.0.0.1:0");
  LogReader log(dir.path("run.jsonl"));
  Measurer measurer({.experts = 4, .top_k = 1, .needs = {}}, {});
  while (const auto line = log.next()) {
    // Every metric there is, so that every name is judged.
    Metrics metrics;
    double value = 0.25;
    for (const MetricField& field : metric_fields()) metrics.*field.value = value += 0.5;
    feed.write(*line, metrics);
  }
  dir.write("metrics.txt", feed.text());
  EXPECT_EQ(run_shell(promtool + " check metrics <'" + dir.path("metrics.txt") + "'", dir.path("said")), 0);
  EXPECT_EQ(TempDir::read(dir.path("said")), "");
  EXPECT_GT(std::ranges::count(feed.text(), '\n'), 200);
}

TEST(Promtool, AcceptsTheRulesAndTheyFire) {
  NEED_PROGRAM(promtool, "promtool");
  const TempDir dir;
  const std::string folder = MOECTL_SOURCE_DIR "/monitoring/";
  EXPECT_EQ(run_shell(promtool + " check rules " + folder + "alerts.yml", dir.path("said")), 0)
      << TempDir::read(dir.path("said"));
  EXPECT_EQ(run_shell(promtool + " check config " + folder + "prometheus.yml", dir.path("said")), 0)
      << TempDir::read(dir.path("said"));
  EXPECT_EQ(run_shell(promtool + " test rules " + folder + "alerts_test.yml", dir.path("said")), 0)
      << TempDir::read(dir.path("said"));
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

/// Every query of the dashboard, with its variables filled in as Grafana would.
std::vector<std::string> dashboard_queries() {
  const auto dashboard = nlohmann::json::parse(TempDir::read(MOECTL_SOURCE_DIR "/monitoring/dashboard.json"));
  std::vector<std::string> queries;
  for (const auto& panel : dashboard["panels"]) {
    for (const auto& target : panel["targets"]) {
      std::string text = target["expr"];
      for (const auto& [from, to] : {std::pair{"$job", "moectl"}, std::pair{"$instance", ".*"},
                                     std::pair{"$layer", ".*"}, std::pair{"$__rate_interval", "5s"}}) {
        text = replaced(text, from, to);
      }
      queries.push_back(text);
    }
  }
  return queries;
}

// The tool follows a log that grows; a server scrapes it, knows its metrics, answers the dashboard's questions, and
// fires an alert of the file as it stands.
TEST(Prometheus, ScrapesTheToolAndFiresAnAlert) {
  NEED_PROGRAM(server, "prometheus");
  const TempDir dir;
  const std::string log = dir.write("run.jsonl", serving_log(0, 2));
  const Process watch({MOECTL_TOOL, "watch", "--plain", "--listen", "127.0.0.1:0", log},
                      dir.path("watch.out"));
  int port = 0;
  ASSERT_TRUE(eventually([&] {
    const std::string said = TempDir::read(dir.path("watch.out"));
    const std::size_t at = said.find("serving http://127.0.0.1:");
    if (at == std::string::npos || said.find("/metrics\n", at) == std::string::npos) return false;
    port = std::stoi(said.substr(at + 25));
    return true;
  })) << TempDir::read(dir.path("watch.out"));

  std::string config = TempDir::read(MOECTL_SOURCE_DIR "/monitoring/prometheus.yml");
  config = replaced(config, "15s", "250ms");
  config = replaced(config, "alerts.yml", MOECTL_SOURCE_DIR "/monitoring/alerts.yml");
  config = replaced(config, "127.0.0.1:9464", "127.0.0.1:" + std::to_string(port));
  dir.write("prometheus.yml", config);
  const int at = free_port();
  const Process prometheus(
      {server, "--config.file=" + dir.path("prometheus.yml"), "--storage.tsdb.path=" + dir.path("data"),
       "--web.listen-address=127.0.0.1:" + std::to_string(at), "--log.level=error"},
      dir.path("prometheus.out"));
  std::atomic<bool> done = false;
  std::thread grow([&] {
    std::ofstream file(log, std::ios::app);
    for (int step = 2; !done; ++step) {
      file << serving_log(step, step + 1) << std::flush;
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  });
  const auto query = [&](const std::string& text) {
    const std::string answer = http_get(at, "/api/v1/query", text);
    return answer.empty() ? nlohmann::json() : nlohmann::json::parse(answer)["data"]["result"];
  };
  EXPECT_TRUE(eventually([&] { return query("moectl_step > 5").size() == 1; }))
      << TempDir::read(dir.path("prometheus.out"));
  EXPECT_TRUE(eventually([&] {
    const auto firing = query(R"(ALERTS{alertname="MoectlLayerCollapsed",alertstate="firing"})");
    return firing.size() == 1 && firing[0]["metric"]["layer"] == "1" &&
           firing[0]["metric"]["severity"] == "critical";
  }));
  EXPECT_TRUE(eventually([&] { return query("rate(moectl_steps_total[5s]) > 0").size() == 1; }));
  for (const std::string& text : dashboard_queries()) {
    EXPECT_TRUE(eventually([&] { return query(text).size() >= 1; }, 15)) << text;
  }
  done = true;
  grow.join();
}

TEST(PrometheusFeed, LoadsAreOverTheirTargets) {
  ControllerConfig config = small_config();
  config.model.targets = {0.5, 0.25, 0.25, 0};
  Controller controller(config);
  PrometheusFeed live("127.0.0.1:0"), read("127.0.0.1:0");
  const TempDir dir;
  {
    RunLogWriter log(dir.path("run.jsonl"), controller.config());
    controller.set_log([&](const StepReport& report) {
      live.write(report);
      log.write(report);
    });
    record(controller, 0, {40, 40, 20, 0});
    record(controller, 1, {50, 25, 25, 0});
    controller.step();
  }
  LogReader log(dir.path("run.jsonl"));
  while (const auto line = log.next()) read.write(*line, Metrics());
  for (const PrometheusFeed* feed : {&live, &read}) {
    const std::string text = feed->text();
    EXPECT_EQ(sample(text, R"(moectl_expert_load_ratio{layer="0",expert="0"})"), 0.8);
    EXPECT_EQ(sample(text, R"(moectl_expert_load_ratio{layer="0",expert="1"})"), 1.6);
    EXPECT_EQ(sample(text, R"(moectl_expert_load_ratio{layer="0",expert="3"})"), 1);
  }
}

// A hostile log may name as many alerts as it likes, and counts that sum beyond 64 bits.
TEST(PrometheusFeed, KeepsTheFirstNamesAndItsCountersNonNegative) {
  PrometheusFeed feed("127.0.0.1:0");
  LogRecord record;
  record.layer = 0;
  record.tag = "train";
  record.stats = RoutingStats({.experts = 2, .top_k = 1, .needs = {}});
  record.stats.add_counts(std::vector<std::int64_t>{(std::int64_t{1} << 53) - 2, 2}, std::int64_t{1} << 53);
  for (int step = 0; step < 1100; ++step) {
    record.step = step;
    record.alerts = {"a" + std::to_string(step)};
    record.notices = {{.kind = "n" + std::to_string(step), .text = "", .step = step}};
    feed.write(record, Metrics());
  }
  const std::string text = feed.text();
  EXPECT_GT(sample(text, "moectl_tokens_total{layer=\"0\"}"), 9.2e18);
  EXPECT_GT(sample(text, "moectl_expert_assignments_total{layer=\"0\",expert=\"0\"}"), 9.2e18);
  EXPECT_EQ(sample(text, "moectl_alert{layer=\"0\",alert=\"a63\"}"), 0);
  EXPECT_THAT(text, Not(HasSubstr("alert=\"a64\"")));
  EXPECT_EQ(sample(text, "moectl_notices_total{layer=\"0\",kind=\"other\"}"), 1100);
  EXPECT_THAT(text, Not(HasSubstr("kind=\"n")));
}

}  // namespace
}  // namespace moectl
