/* The whole loop in C, without a model: a made-up router that favours a few experts, and the controller that evens it
 * out. Ends with 1 if it could not. */
#include <stdint.h>
#include <stdio.h>

#include "moectl.h"

#define EXPERTS 8
#define TOKENS 4096

static const char kConfig[] =
    "{\"version\": 1,"
    " \"model\": {\"layers\": 1, \"experts\": 8, \"top_k\": 1, \"tokens_per_step\": 4096},"
    " \"expert_bias\": {\"policy\": \"adaptive_bias\"}}";

/* A number between 0 and 1. */
static double uniform(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 11) / 9007199254740992.0;
}

/* The expert of one token: the largest biased score, of a router that prefers low indices. */
static int32_t choose(const double* bias) {
  int32_t best = 0;
  double largest = -1e9;
  for (int32_t i = 0; i < EXPERTS; ++i) {
    const double score = uniform() - 0.1 * i + bias[i];
    if (score > largest) {
      largest = score;
      best = i;
    }
  }
  return best;
}

int main(void) {
  moectl_controller* controller;
  if (moectl_new(kConfig, NULL, &controller) != MOECTL_OK) {
    fprintf(stderr, "%s\n", moectl_error());
    return 1;
  }
  double bias[EXPERTS] = {0};
  moectl_figures figures = {.size = sizeof figures};
  double excess = 0; /* of MaxVio over its floor, mean of the last steps */
  for (int step = 0; step < 100; ++step) {
    int32_t experts[TOKENS];
    for (int t = 0; t < TOKENS; ++t) experts[t] = choose(bias);
    const moectl_batch batch = {.size = sizeof batch, .tokens = TOKENS, .experts32 = experts};
    if (moectl_record(controller, 0, &batch, -1) != MOECTL_OK || moectl_step(controller, NULL) != MOECTL_OK ||
        moectl_biases(controller, 0, bias, EXPERTS) != MOECTL_OK ||
        moectl_figures_of(controller, &figures) != MOECTL_OK) {
      fprintf(stderr, "%s\n", moectl_error());
      return 1;
    }
    if (step % 20 == 0) {
      printf("step %3d  MaxVio %.3f (floor %.3f)  bias of the last expert %+.2f\n", step, figures.max_vio,
             figures.floor_max_vio, bias[EXPERTS - 1]);
    }
    if (step >= 60) excess += figures.max_vio / figures.floor_max_vio / 40;
  }
  moectl_free(controller);
  printf("MaxVio over its floor from step 60 on: %.2f\n", excess);
  return excess < 1.5 ? 0 : 1;
}
