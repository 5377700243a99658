// The biases in files of every kind, and the tool's answers about them.
#include "import/biases.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "altered_state.h"
#include "cli/tool.h"
#include "import/import.h"
#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "moectl/state_file.h"
#include "temp_dir.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Biases = std::vector<double>;

template <class T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::string safetensors(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

/// Layer 3 in float32, layer 4 in bfloat16, layer 5 in float16; and a weight.
std::string checkpoint() {
  std::vector<std::uint16_t> brain, half = {0x3800, 0xb400, 0x3000, 0};
  for (const float x : {.5F, -.25F, .125F, 0.F}) {
    brain.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16));
  }
  return safetensors(
      R"({"__metadata__":{"format":"pt"},)"
      R"("model.layers.3.mlp.gate.e_score_correction_bias":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
      R"("model.layers.4.mlp.gate.e_score_correction_bias":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]},)"
      R"("model.layers.5.mlp.gate.e_score_correction_bias":{"dtype":"F16","shape":[4],"data_offsets":[24,32]},)"
      R"("model.layers.3.mlp.gate.weight":{"dtype":"F32","shape":[4,1],"data_offsets":[32,48]}})",
      raw(std::vector<float>{.5F, -.25F, .125F, 0}) + raw(brain) + raw(half) + raw(std::vector<float>(4, 7)));
}

std::string what_of(const std::string& path, const BiasSource& source = {}) {
  try {
    biases_in(path, source);
  } catch (const ImportError& error) {
    return error.what();
  }
  return "";
}

TEST(BiasFiles, ASafetensorsCheckpoint) {
  const TempDir dir;
  const Biases expected = {.5, -.25, .125, 0};
  const LayerBiases found = biases_in(dir.write("m.safetensors", checkpoint()));
  EXPECT_EQ(found, (LayerBiases{{3, expected}, {4, expected}, {5, expected}}));
  EXPECT_EQ(
      biases_in(dir.path("m.safetensors"), {.tensor = "model.layers.{}.mlp.gate.e_score_correction_bias"}),
      found);
  EXPECT_THAT(what_of(dir.path("m.safetensors"), {.tensor = "decoder.{}.bias"}),
              AllOf(HasSubstr("--tensor"), HasSubstr("model.layers.3.mlp.gate.e_score_correction_bias")));
  EXPECT_THAT(what_of(dir.path("m.safetensors"), {.tensor = "model.layers.{}.mlp.gate.weight"}),
              HasSubstr("[experts]"));
  EXPECT_THAT(what_of(dir.path("m.safetensors"), {.tensor = "bias"}), HasSubstr("must hold {}"));
}

TEST(BiasFiles, ABrokenCheckpointIsRefused) {
  const TempDir dir;
  const std::string whole = checkpoint();
  EXPECT_THAT(what_of(dir.write("a", whole.substr(0, whole.size() - 40))), HasSubstr("ends within"));
  EXPECT_THAT(what_of(dir.write("b", whole.substr(0, 100))), HasSubstr("ends within its header"));
  const auto one = [&](const std::string& tensor) {
    return what_of(
        dir.write("c", safetensors("{\"layers.1.expert_bias\":" + tensor + "}", std::string(64, '\0'))));
  };
  EXPECT_THAT(one(R"({"dtype":"I64","shape":[4],"data_offsets":[0,32]})"), HasSubstr("dtype I64"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,32]})"), HasSubstr("data_offsets"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[4],"data_offsets":[16,0]})"), HasSubstr("data_offsets"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]})"),
              HasSubstr("shape"));
  EXPECT_THAT(one(R"({"dtype":"F32","shape":[4],"data_offsets":[1000,1016]})"), HasSubstr("ends within"));
}

TEST(BiasFiles, ArraysAndLists) {
  const TempDir dir;
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  header.resize(118, ' ');
  header.back() = '\n';
  const std::string npy = std::string("\x93NUMPY\x01\x00", 8) + static_cast<char>(118) + '\0' + header +
                          raw(std::vector<float>{1, 2, 3, .5F, 0, -1});
  const LayerBiases rows = {{4, {1, 2, 3}}, {5, {.5, 0, -1}}};
  EXPECT_EQ(biases_in(dir.write("b.npy", npy), {.first_layer = 4}), rows);
  EXPECT_EQ(biases_in(dir.write("b.json", "[[1,2,3],[0.5,0,-1]]"), {.first_layer = 4}), rows);
  EXPECT_EQ(biases_in(dir.write("c.json", " [1,2,3]")), (LayerBiases{{0, {1, 2, 3}}}));
  EXPECT_EQ(biases_in(dir.write("d.json", biases_json(rows))), rows);
  EXPECT_THAT(what_of(dir.write("e.json", "[1,null]")), HasSubstr("null: must be a number"));
  EXPECT_THAT(what_of(dir.write("f.yaml", "version: 1\n")), HasSubstr("is none of"));
  EXPECT_THAT(what_of(dir.path("nowhere")), HasSubstr("cannot be opened"));
}

TEST(BiasFiles, ARunLogAndAStateHoldWhatIsInForce) {
  const TempDir dir;
  const ControllerConfig config = parse_config(
      "version: 1\nmodel: {score_space: logit}\n"
      "layers: [{ids: [2, 5], experts: 8, top_k: 2}, {ids: [7], experts: 4, top_k: 1}]\n"
      "expert_bias: {policy: adaptive_bias}");
  Controller controller(config);
  {
    RunLogWriter writer(dir.path("run.jsonl.gz"), config);
    controller.set_log([&](const StepReport& report) { writer.write(report); });
    SimulationOptions plant;
    plant.score_space = ScoreSpace::kLogit;
    simulate(controller, plant, 20);
    controller.set_log({});
  }
  LayerBiases expected;
  for (const int layer : controller.layers()) {
    expected[layer].assign(controller.bias(layer).begin(), controller.bias(layer).end());
  }
  EXPECT_EQ(biases_in(dir.path("run.jsonl.gz")), expected);
  EXPECT_EQ(biases_in(dir.write("controller.state", controller.save())), expected);
}

TEST(BiasFiles, TheToolTakesThemOutForAConfig) {
  const TempDir dir;
  dir.write("m.safetensors", checkpoint());
  const auto made = run_tool(dir, "biases " + dir.path("m.safetensors") + " -o " + dir.path("b.json"));
  ASSERT_EQ(made.code, 0) << made.err;
  const std::string config =
      dir.write("c.yaml",
                "version: 1\nmodel: {experts: 4, top_k: 1}\nlayers: [{first: 3, count: 3}]\n"
                "expert_bias: {policy: adaptive_bias, initial: b.json}\n");
  const Controller controller(load_config(config));
  EXPECT_EQ(controller.bias(4)[1], -.25);
  const auto same =
      run_tool(dir, "biases " + dir.path("m.safetensors") + " " + dir.path("b.json") + " --format json");
  EXPECT_THAT(same.out, HasSubstr(R"("largest":0.0)"));
  const auto table = run_tool(dir, "biases " + dir.path("b.json"));
  EXPECT_THAT(table.out, HasSubstr("deviation"));
}

TEST(FieldCases, B6_WhatToDeployIsInTheLogAndInTheState) {
  const TempDir directory;
  SimulationOptions plant;
  plant.layers = 2;
  plant.mixture_spread = 1;
  plant.scenario = Scenario::kNoise;
  ControllerConfig config;
  config.model.layers = 2;
  config.model.experts = plant.experts;
  config.model.top_k = plant.top_k;
  config.model.score_space = plant.score_space;
  config.model.domains = {"a", "b", "c", "d"};
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.options.set("feedforward", std::string("tags"));
  Controller controller(config);
  const std::string log = directory.path("run.jsonl"), state = directory.path("controller.state");
  {
    RunLogWriter writer(log, config);
    controller.set_log([&](const StepReport& report) { writer.write(report); });
    simulate(controller, plant, 40);
  }
  write_file_atomically(state, controller.save());
  for (int layer = 0; layer < 2; ++layer) {
    const Biases deployed = controller.deployment_bias(layer);
    const Biases in_force(controller.bias(layer).begin(), controller.bias(layer).end());
    EXPECT_NE(deployed, in_force);
    EXPECT_EQ(biases_in(log).at(layer), in_force);
    EXPECT_EQ(biases_in(state).at(layer), in_force);
    EXPECT_EQ(biases_in(log, {.deployed = true}).at(layer), deployed);
    EXPECT_EQ(biases_in(state, {.deployed = true}).at(layer), deployed);
  }
}

TEST(BiasFiles, DeepNestingIsRefusedBeforeItIsParsed) {
  const TempDir directory;
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  const std::string header =
      R"({"layers.0.expert_bias":{"dtype":"F32","data_offsets":[0,4],"shape":)" + deep + "}}";
  for (const std::string& text : {R"({"format":"moectl-biases","version":1,"layers":{"0":)" + deep + "}}",
                                  "[[0.0]," + deep + "]", safetensors(header, "0000")}) {
    EXPECT_THAT(what_of(directory.write("file", text)), HasSubstr("nested deeper than 64 levels"));
  }
  EXPECT_EQ(what_of(directory.write("brackets.json", R"([[0.5, 0.25]])")), "");
}

// What no router can add, and what the file of -o cannot hold. The mean of no values has no minimum either.
TEST(BiasFiles, EveryLayerHasFiniteNumbers) {
  const TempDir dir;
  const auto wrong = [&](const std::string& text, const std::string& words) {
    const std::string path = dir.write("file", text);
    EXPECT_THAT(what_of(path), HasSubstr(path + ": " + words)) << text;
    for (const std::string arguments : {"file", "file file", "file --format json", "file -o out.json"}) {
      const ToolResult result = run_tool(dir, "biases " + arguments);
      EXPECT_EQ(result.code, 1) << arguments;
      EXPECT_THAT(result.err, HasSubstr("file: " + words)) << arguments;
    }
  };
  wrong("[[]]", "layer 0: holds no biases: must have one for each expert");
  wrong("[[1,2,3],[]]", "layer 1: holds no biases");
  wrong(R"({"format":"moectl-biases","version":1,"layers":{"0":[]}})", "layer 0: holds no biases");
  wrong(R"({"format":"moectl-biases","version":1,"layers":{}})", "holds no biases");
  wrong("[[1,2],[0,1e300]]", "layer 1, expert 1: 1e+300: must be a number from -1e100 to 1e100");
  const std::string one = R"({"layers.4.expert_bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})";
  wrong(safetensors(one, raw(std::vector<float>{0, 1, std::nanf("")})), "layer 4, expert 2: nan: must be");
  wrong(safetensors(one, raw(std::vector<float>{0, -HUGE_VALF, 0})), "layer 4, expert 1: -inf: must be");
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }";
  header.resize(118, ' ');
  wrong(std::string("\x93NUMPY\x01\x00\x76\x00", 10) + header + raw(std::vector<float>{1, std::nanf("")}),
        "layer 0, expert 1: nan: must be");
}

TEST(BiasFiles, ALogHasABiasForEachExpert) {
  const TempDir dir;
  const auto log = [&](const std::string& layers, const std::string& actuator) {
    return dir.write("run.jsonl",
                     R"({"format":"moectl-run","version":1,"config":{"model":)"
                     R"({"layers":1,"experts":4,"top_k":1})" +
                         layers +
                         "}}\n"
                         R"({"step":0,"layer":0,"tokens":8,"metrics":{},"health":"healthy","actuators":)"
                         R"({"expert_bias":{)" +
                         actuator + "}}}\n");
  };
  EXPECT_EQ(biases_in(log("", R"("applied":[0,1,2,3])")), (LayerBiases{{0, {0, 1, 2, 3}}}));
  EXPECT_THAT(what_of(log("", R"("applied":[null,1,2,3])")), HasSubstr("run.jsonl: layer 0, expert 0: nan"));
  EXPECT_THAT(what_of(log("", R"("applied":[1,2,3])")),
              HasSubstr("run.jsonl:2: layer 0: actuators.expert_bias.applied: 3 values: must have 4"));
  EXPECT_THAT(what_of(log("", R"("applied":[0,1,2,3],"deployed":[0])")),
              HasSubstr("actuators.expert_bias.deployed: 1 values: must have 4"));
  EXPECT_THAT(what_of(log(R"(,"layers":[{"ids":[0],"experts":8,"top_k":1}])", R"("applied":[0,1,2,3])")),
              HasSubstr("4 values: must have 8"));
  // In shadow what is logged as applied was never in force.
  EXPECT_EQ(biases_in(log("", R"("applied":[0,1,2,3],"deployed":[0,0,0,1],"reasons":["shadow"])")),
            (LayerBiases{{0, {0, 0, 0, 1}}}));
}

// Sums of offsets wrapped, and of two entries with one name the last one counted.
TEST(BiasFiles, ACheckpointThatContradictsItselfIsRefused) {
  const TempDir dir;
  const auto what = [&](const std::string& header) {
    return what_of(dir.write("c", safetensors(header, std::string(16, '\0'))));
  };
  const std::string tensor = R"({"dtype":"F32","shape":[4],"data_offsets":[)";
  EXPECT_THAT(what(R"({"layers.1.expert_bias":)" + tensor + "18446744073709551592,18446744073709551608]}}"),
              HasSubstr("c: layers.1.expert_bias: data_offsets [18446744073709551592,18446744073709551608]: "
                        "must be the begin and the end of its 16 bytes"));
  EXPECT_THAT(what(R"({"layers.1.expert_bias":)" + tensor + "9223372036854775784,9223372036854775800]}}"),
              HasSubstr("the file ends within it, after 16 bytes of tensors"));
  EXPECT_THAT(what(R"({"layers.1.expert_bias":)" + tensor + "1,17]}}"), HasSubstr("after 16 bytes"));
  EXPECT_EQ(what(R"({"layers.1.expert_bias":)" + tensor + "0,16]}}"), "");
  EXPECT_THAT(
      what(R"({"layers.1.expert_bias":)" + tensor + R"(0,16]},"layers.1.expert_bias":)" + tensor + "0,16]}}"),
      HasSubstr("key \"layers.1.expert_bias\" stands twice"));
  EXPECT_THAT(
      what(R"({"layers.1.a.expert_bias":)" + tensor + R"(0,16]},"layers.1.b.expert_bias":)" + tensor +
           "0,16]}}"),
      AllOf(HasSubstr("layers.1.a.expert_bias"), HasSubstr("layers.1.b.expert_bias"), HasSubstr("--tensor")));
}

TEST(BiasFiles, ALayerThatStandsTwiceIsRefused) {
  const TempDir dir;
  const auto what = [&](const std::string& layers) -> std::string {
    const std::string path =
        dir.write("b.json", R"({"format":"moectl-biases","version":1,"layers":)" + layers + "}");
    std::string error;
    try {
      read_biases(path);
    } catch (const ConfigError& e) {
      error = e.what();
    }
    EXPECT_EQ(what_of(path), error);
    return error;
  };
  EXPECT_EQ(what(R"({"0":[1,2],"1":[3,4]})"), "");
  EXPECT_THAT(what(R"({"0":[1,2],"0":[3,4]})"), HasSubstr("b.json: key \"0\" stands twice in one object"));
  EXPECT_THAT(what(R"({"0":[1,2]},"layers":{"0":[3,4]})"), HasSubstr("key \"layers\" stands twice"));
  EXPECT_THAT(what(R"({"0":[1,2],"00":[3,4]})"), HasSubstr("b.json: layers: 00: layer 0 stands twice"));
}

// json.dump of Python puts blanks and lines where moectl writes none, and an editor may put a mark in front.
TEST(BiasFiles, AFileOfBiasesIsToldByItsFormat) {
  const TempDir dir;
  const LayerBiases biases = {{0, {0.5, 0}}, {3, {-1, 0.25}}};
  for (const std::string text :
       {R"({"format": "moectl-biases", "version": 1, "layers": {"0": [0.5, 0], "3": [-1, 0.25]}})",
        "{\n  \"layers\": {\"0\": [0.5, 0], \"3\": [-1, 0.25]},\n  \"version\": 1,\n"
        "  \"format\": \"moectl-biases\"\n}\n",
        "\xef\xbb\xbf\n{\"format\":\"moectl-biases\",\"version\":1,\"layers\":"
        "{\"0\":[0.5,0],\"3\":[-1,0.25]}}"}) {
    EXPECT_EQ(biases_in(dir.write("b.json", text)), biases) << text;
    EXPECT_EQ(read_biases(dir.path("b.json")), biases) << text;
  }
  for (const char* other :
       {R"({"note":{"format":"moectl-biases"}})", R"({"format":{"format":"moectl-biases"}})"})
    EXPECT_THAT(what_of(dir.write("b.json", other)), HasSubstr("b.json:1: "));
}

// Each layer was looked for from the start of the state: so many of them took minutes.
TEST(HostileInput, AStateOfManyLayersIsReadOnce) {
  const auto entry = [](const std::string& name, char type, std::uint64_t count, const std::string& data) {
    const auto length = static_cast<std::uint32_t>(name.size());
    return std::string(reinterpret_cast<const char*>(&length), 4) + name + type +
           std::string(reinterpret_cast<const char*>(&count), 8) + data;
  };
  std::string body =
      entry("steps", 'i', 1, std::string(8, '\0')) + entry("settings_from", 'i', 1, std::string(8, '\0'));
  for (int layer = 0; layer < 300000; ++layer) body += entry("layer " + std::to_string(layer), 's', 0, "");
  const TempDir dir;
  dir.write("state", testing::with_state_header(body));
  EXPECT_THAT(what_of(dir.path("state")), HasSubstr("holds no biases"));
}

TEST(HostileInput, BiasesOfMoreLayersTimesExpertsThanThereMayBeAreRefused) {
  const TempDir dir;
  std::string header = "{'descr': '<i1', 'fortran_order': False, 'shape': (70, 65536), }";
  header.resize(118, ' ');
  dir.write("b.npy", std::string("\x93NUMPY\1\0\x76\0", 10) + header);
  EXPECT_THAT(what_of(dir.path("b.npy")),
              HasSubstr("b.npy: 4587520 layers x experts: must be at most 4194304"));
  // Tensors that all lie at the same bytes.
  std::string tensors = "{";
  for (int layer = 0; layer < 70; ++layer) {
    tensors += (layer ? ",\"layers." : "\"layers.") + std::to_string(layer) +
               R"(.expert_bias":{"dtype":"BF16","shape":[65536],"data_offsets":[0,131072]})";
  }
  dir.write("b.safetensors", safetensors(tensors + "}", std::string(131072, '\0')));
  EXPECT_THAT(what_of(dir.path("b.safetensors")), HasSubstr("layers x experts: must be at most 4194304"));
}

// Two bytes of text make a value that takes twenty times as much.
TEST(HostileInput, EmptyListsInPlaceOfBiasesAreCounted) {
  const TempDir dir;
  std::string lists = "[[]";
  for (int i = 1; i < 8'400'000; ++i) lists += ",[]";
  dir.write("b.json", lists + "]");
  EXPECT_THAT(what_of(dir.path("b.json")), HasSubstr("values: must be at most 8388608"));
  dir.write("own.json", R"({"format":"moectl-biases","version":1,"layers":)" + lists + "]}");
  EXPECT_THAT(what_of(dir.path("own.json")), HasSubstr("values: must be at most 8388608"));
}

// A pipe has no end until someone writes it, and some devices have none at all.
TEST(HostileInput, BiasesOfAConfigAreAFile) {
  const TempDir dir;
  for (const std::string& path : {dir.path("."), std::string("/dev/zero")}) {
    try {
      read_biases(path);
      ADD_FAILURE() << path;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr(path + ": must be a regular file"));
    }
  }
  ASSERT_EQ(mkfifo(dir.path("pipe").c_str(), 0600), 0);
  EXPECT_THROW(read_biases(dir.path("pipe")), ConfigError);
}

}  // namespace
}  // namespace moectl
