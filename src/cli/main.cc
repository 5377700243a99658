// moectl: checks, simulates, replays and reports. Exit codes: 0 good, 1 the input or config is wrong, 2 usage.
#include <dlfcn.h>

#include <iostream>
#include <new>

#include "base/foreign.h"
#include "cli/terminal.h"
#include "cli/tool.h"
#include "moectl/config.h"
#include "moectl/run_log.h"
#include "moectl/version.h"

namespace moectl::cli {
namespace {

/// Lets a shared object add its policies. Only a file named on the command line is ever loaded.
void load_plugin(const std::string& path, PolicyRegistry& registry) {
  // Without a slash dlopen would search the system's directories.
  const std::string file = path.find('/') == std::string::npos ? "./" + path : path;
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw InputError(std::string("plugin: ") + dlerror());
  using Register = void (*)(PolicyRegistry&);
  const auto add = reinterpret_cast<Register>(dlsym(handle, "moectl_register"));
  if (!add) {
    throw InputError("plugin: " + path +
                     ": must export extern \"C\" void moectl_register(moectl::PolicyRegistry&)");
  }
  call_foreign("plugin: " + path,
               [&] { add(registry); });  // the object stays loaded: the registry now holds its code
}

int run(int argc, char** argv) {
  CLI::App app(
      "moectl keeps the experts of a Mixture-of-Experts model evenly loaded while it trains.\n"
      "This tool checks configs, simulates and replays routing, and compares runs. '-' reads standard input.",
      "moectl");
  app.set_version_flag("--version", std::string("moectl ") + kVersion, "Print the version and exit");
  app.require_subcommand(1);
  app.fallthrough();
  Tool tool;
  register_builtin_policies(tool.registry);
  std::vector<std::string> plugins;
  app.add_option("--plugin", plugins, "Shared object with your own policies; may be given more than once")
      ->type_name("FILE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  // Newer versions of CLI11 reflow text. Examples are lines.
  [](auto& formatter) {
    if constexpr (requires { formatter.enable_footer_formatting(false); }) {
      formatter.enable_footer_formatting(false);
      formatter.enable_description_formatting(false);
    }
  }(*app.get_formatter());
  add_biases(app, tool);
  add_capacity(app, tool);
  add_check(app, tool);
  add_compare(app, tool);
  add_import(app, tool);
  add_metrics(app, tool);
  add_placement(app, tool);
  add_policies(app, tool);
  add_replay(app, tool);
  add_report(app, tool);
  add_simulate(app, tool);
  add_tensorboard(app, tool);
  add_watch(app, tool);
  // An empty value is a variable of a shell that nobody has set.
  const CLI::Validator not_empty(
      [](const std::string& value) { return value.empty() ? "must not be empty" : ""; }, "");
  std::vector<CLI::App*> commands = app.get_subcommands({});
  commands.push_back(&app);
  for (CLI::App* const command : commands) {
    for (CLI::Option* const option : command->get_options()) {
      if (option->get_items_expected_max() > 0) option->check(not_empty);
    }
  }
  app.footer(
      "Exit codes: 0 good, 1 the input or config is wrong, 2 usage.\n'moectl COMMAND --help' has examples.");
  for (int i = 1; i < argc; ++i) {
    // CLI11 would take the next word as the value of --NAME=.
    const std::string_view word = argv[i];
    if (word.starts_with("--") && word.find('=') == word.size() - 1) {
      std::cerr << word.substr(0, word.size() - 1)
                << ": must not be empty\nRun with --help for more information.\n";
      return 2;
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  for (const std::string& plugin : plugins) load_plugin(plugin, tool.registry);
  return tool.run();
}

}  // namespace
}  // namespace moectl::cli

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  const moectl::cli::PrintableOutput printable_output;
  try {
    const int code = moectl::cli::run(argc, argv);
    std::cout.flush();
    if (!std::cout) {
      std::cerr << "moectl: standard output: cannot be written\n";
      return 1;
    }
    return code;
  } catch (const std::bad_alloc&) {
    std::cerr << "moectl: not enough memory\n";
    return 1;
  } catch (const std::exception& e) {
    std::cout.flush();
    std::cerr << "moectl: " << e.what() << '\n';
    return 1;
  } catch (...) {
    std::cout.flush();
    std::cerr << "moectl: " << moectl::kNoMessage << '\n';
    return 1;
  }
}
