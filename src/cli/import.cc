// moectl import FORMAT FILE…: dumps of other systems become a trace.
#include "import/import.h"

#include <algorithm>
#include <iostream>
#include <memory>

#include "base/input_limits.h"
#include "base/utf8.h"
#include "cli/tool.h"

namespace moectl::cli {

void add_import(CLI::App& app, Tool& tool) {
  struct Options {
    std::string format, output, by;
    std::vector<std::string> files;
    ImportOptions import;
  };
  CLI::App* command = app.add_subcommand("import", "Turn the dumps of other systems into a trace");
  std::vector<std::string> names;
  std::string footer = "Formats:\n";
  for (const ImportFormat& format : import_formats()) {
    names.emplace_back(format.name);
    footer +=
        "  " + names.back() + std::string(13 - names.back().size(), ' ') + std::string(format.expects) + '\n';
  }
  command->footer(
      footer +
      "The command of each system that writes its dump: docs/import.md. What was assumed is said "
      "on standard error.\n\n"
      "Examples:\n"
      "  moectl import sglang expert_distribution_rank*.csv --top-k 8 -o trace.jsonl\n"
      "  moectl import vllm routed_experts.npy -o trace.jsonl.gz\n"
      "  moectl import wandb export.csv --top-k 2 -o trace.jsonl && moectl report trace.jsonl -o "
      "report.html\n"
      "  moectl import megatron router_trace_rank*.jsonl --by micro-batch -o - | moectl capacity -\n"
      "  zcat dump.jsonl.gz | moectl import megatron - -o - | moectl metrics -");
  auto options = std::make_shared<Options>();
  ImportOptions& import = options->import;
  command->add_option("FORMAT", options->format, "See below")->required()->check(CLI::IsMember(names));
  command
      ->add_option("FILE", options->files,
                   "Dumps, plain or gzip; - reads standard input. Files of ranks are told apart by rankN or "
                   "rank_N in their names; other files follow each other in time")
      ->required();
  command
      ->add_option("-o,--output", options->output,
                   "Trace to write; - is standard output, a name in .gz is compressed")
      ->required();
  command
      ->add_option("--top-k", import.top_k, "Experts that each token selects, where the dump does not say it")
      ->check(whole_number(1, 1024));
  command
      ->add_option("--experts", import.experts,
                   "Experts of a layer; default: the columns of the dump, or its largest number + 1")
      ->check(whole_number(1, kMostExperts));
  command->add_option("--tokens", import.tokens, "Tokens of a step, for dumps of shares")
      ->check(whole_number(1, std::int64_t{1} << 40));
  command
      ->add_option("--tokens-per-step", import.tokens_per_step,
                   "Tokens that make a step, for vllm and llama.cpp, which know none")
      ->check(whole_number(1, std::int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--metric", import.metric,
                      "Part of the name of the wanted columns or tags, for wandb and tensorboard");
  command
      ->add_option("--values", import.values,
                   "What the numbers are; auto looks at all rows, their type and sum")
      ->check(CLI::IsMember({"auto", "counts", "share", "percent", "ratio"}))
      ->capture_default_str();
  command->add_option("--scores", import.scores, "The model's function on router logits")
      ->check(CLI::IsMember({"softmax", "sigmoid"}))
      ->capture_default_str();
  command->add_option(
      "--mask", import.mask,
      "Attention mask [batch, sequence] of router logits, as .npy; gives the sequences as well");
  command
      ->add_option("--sequence-length", import.sequence_length,
                   "Tokens of a sequence, for router logits without mask")
      ->check(whole_number(1));
  command->add_flag(
      "--pairs", import.pairs,
      "Keep how many tokens chose each two experts, for `moectl metrics --loads` and the report; "
      "for vllm, megatron and hf");
  command->add_option("--tag", import.tag, "Tag of the records")->capture_default_str();
  command
      ->add_option(
          "--by", options->by,
          "rank: keep ranks apart, under the tags rank0, rank1, ...; micro-batch: micro-batches as well, "
          "under rank0/mb0, rank0/mb1, ..., for megatron, hf and llama.cpp; else they are summed")
      ->check(CLI::IsMember({"rank", "micro-batch"}));
  command->callback([&tool, options] {
    tool.run = [options] {
      options->import.by_rank = options->by == "rank";
      options->import.by_micro_batch = options->by == "micro-batch";
      const std::string& tag = options->import.tag;
      if (std::ranges::any_of(tag, [](unsigned char c) { return c < 0x20 || c == '"' || c == '\\'; }) ||
          find_not_utf8(tag) != std::string::npos)
        throw InputError("--tag: must be UTF-8 without quote, backslash or control character");
      keep_inputs("--output", options->output, options->files);
      keep_inputs("--output", options->output, {options->import.mask});
      const ImportReport report =
          import_trace(options->format, options->files, options->output, options->import);
      for (const std::string& note : report.notes) std::cerr << "import: " << note << '\n';
      std::cerr << said_path(options->output) << ": " << report.steps << " steps, " << report.records
                << " records, " << report.experts << " experts\n";
      return 0;
    };
  });
}

}  // namespace moectl::cli
