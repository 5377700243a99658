// moectl policies [NAME]: what is registered, with options, defaults, units.
#include <iostream>
#include <memory>

#include "cli/tool.h"
#include "config/config_explain.h"
#include "moectl/config.h"

namespace moectl::cli {
namespace {

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

std::string actuators_of(const PolicyDescription& policy) {
  std::vector<std::string> names;
  for (const Actuator actuator : policy.actuators) names.emplace_back(name_of(actuator));
  return joined(names, ", ");
}

void list(const PolicyRegistry& registry) {
  std::size_t name_width = 0, actuator_width = 0;
  for (const PolicyDescription* policy : registry.all()) {
    name_width = std::max(name_width, policy->name.size());
    actuator_width = std::max(actuator_width, actuators_of(*policy).size());
  }
  for (const PolicyDescription* policy : registry.all()) {
    const std::string actuators = actuators_of(*policy);
    std::cout << policy->name << std::string(name_width + 2 - policy->name.size(), ' ') << actuators
              << std::string(actuator_width + 2 - actuators.size(), ' ') << policy->summary << '\n';
  }
}

void describe(const PolicyDescription& policy) {
  std::cout << policy.name << ": " << policy.summary << "\nserves: " << actuators_of(policy) << '\n';
  std::cout << (policy.options.empty() ? "options: none\n" : "options:\n");
  for (const OptionSpec& spec : policy.options) {
    std::cout << "  " << spec.name << ": " << default_of(spec) << "   # " << range_of(spec);
    if (!spec.unit.empty()) std::cout << ", " << spec.unit;
    std::cout << "\n      " << spec.description << '\n';
  }
  std::cout << policy.details;
}

}  // namespace

void add_policies(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("policies", "List the policies, or describe one");
  command->footer(
      "Examples:\n"
      "  moectl policies\n"
      "  moectl policies sign_bias\n"
      "  moectl --plugin ./libmine.so policies mine");
  auto name = std::make_shared<std::string>();
  command->add_option("NAME", *name, "The policy to describe");
  command->callback([&tool, name] {
    tool.run = [&tool, name] {
      if (name->empty()) {
        list(tool.registry);
        return 0;
      }
      const PolicyDescription* policy = tool.registry.find(*name);
      if (!policy) {
        std::vector<std::string> names;
        for (const PolicyDescription* p : tool.registry.all()) names.push_back(p->name);
        const std::string near = nearest_key(*name, names);
        throw InputError(
            "policies: " + *name + ": unknown policy; " +
            (near.empty() ? "there are " + joined(names, ", ") : "did you mean '" + near + "'?"));
      }
      describe(*policy);
      return 0;
    };
  });
}

}  // namespace moectl::cli
