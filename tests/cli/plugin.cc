// A shared object as a user would build one: what `moectl --plugin` loads in the tests.
#include <cstdlib>
#include <memory>

#include "moectl/policy.h"

namespace {

class Nudge final : public moectl::Policy {
 public:
  explicit Nudge(double by) : by_(by) {}
  void propose(const moectl::LayerView&, std::span<double> value) override {
    value[0] += by_;
    value[1] -= by_;
  }

 private:
  double by_;
};

}  // namespace

extern "C" void moectl_register(moectl::PolicyRegistry& registry) {
  moectl::PolicyDescription d;
  d.name = "nudge";
  d.summary = "moves the first expert up and the second down";
  d.actuators = {moectl::Actuator::kExpertBias};
  d.options = {{.name = "by",
                .default_value = 0.001,
                .unit = "score",
                .description = "how far",
                .min = 0,
                .max = 1,
                .choices = {}}};
  d.make = [](const moectl::PolicyContext&, const moectl::PolicyOptions& options) {
    return std::make_unique<Nudge>(options.number("by"));
  };
  registry.add(d);
  d.name = "absent";
  d.make = [](const moectl::PolicyContext&, const moectl::PolicyOptions&) {
    return std::unique_ptr<moectl::Policy>();
  };
  registry.add(d);
  d.name = "seven";
  d.make = [](const moectl::PolicyContext&, const moectl::PolicyOptions&) -> std::unique_ptr<moectl::Policy> {
    throw 7;
  };
  registry.add(d);
  if (std::getenv("MOECTL_TEST_PLUGIN_THROWS") != nullptr) throw 7;
}
