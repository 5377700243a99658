// Feeds one uneven step to an endpoint and checks that a scrape would show it.
#include <cstdint>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/prometheus.h"

int main() {
  moectl::Controller controller(
      moectl::parse_config("version: 1\nmodel: {layers: 1, experts: 2, top_k: 1}\n"));
  moectl::PrometheusFeed feed("127.0.0.1:0");
  controller.set_log([&](const moectl::StepReport& report) { feed.write(report); });
  const std::vector<std::int64_t> experts = {0, 0, 0, 1};
  controller.record(0, {.experts = experts});
  controller.step();
  return feed.text().find("moectl_max_vio{layer=\"0\"} 0.5\n") != std::string::npos && feed.port() > 0 ? 0
                                                                                                       : 1;
}
