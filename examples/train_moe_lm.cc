// Trains a byte-level Mixture-of-Experts language model on real text under a moectl controller.
//
//   train_moe_lm                                          uncontrolled
//   train_moe_lm --policy policies/adaptive_bias.yaml     controlled
//   train_moe_lm --text a.txt b.txt                       on your own text; the last file switches on at 60 %
//
// The text comes in domains, so that experts have something to specialise in. One domain stays off until 60 %
// of the run: a distribution shift that the controller has to absorb. Batches depend on (seed, step) alone
// and a checkpoint holds model, optimizer and controller, so a resumed run continues bit for bit (with the
// same number of threads).

#include <CLI/CLI.hpp>
#include <cstdio>

#include "trainer.h"

int main(int argc, char** argv) {
  restart_with_passive_threads(argv);
  Arguments arguments;
  CLI::App app(
      "Trains a byte-level Mixture-of-Experts language model on real text under a moectl controller.");
  arguments.declare(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  set_up_threads(arguments.threads);
  try {
    Training(arguments).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_moe_lm: %s\n", error.what());
    return 1;
  }
  return 0;
}
