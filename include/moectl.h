/* moectl in C: the control loop for training programs in other languages than C++.
 *
 *   moectl_controller* c;
 *   if (moectl_new_from_file("adaptive_bias.yaml", &c)) return puts(moectl_error());
 *   ...forward:   moectl_record(c, layer, &batch, -1);        any number of times, from any threads
 *   ...optimizer: moectl_step(c, &info);                      once an optimizer step
 *   ...router:    moectl_biases(c, layer, bias, experts);
 *   moectl_free(c);
 *
 * Results. Every call returns MOECTL_OK (0) or another code of `enum moectl_code`; moectl_error() then has the words. A
 * call that fails has changed nothing, unless its comment says otherwise. No C++ exception leaves the library.
 *
 * Ownership. What is passed in belongs to the caller and is not kept after the call, except for the callbacks and their
 * `user`. What comes out as `char**` is the caller's, to be given to moectl_free_text().
 *
 * Threads. Different controllers are independent. On one controller, recording and moectl_say() may run in several
 * threads at once; every other call needs to be alone on the controller, unless its comment says otherwise.
 *
 * Layers. `layer` is the model's own id of the layer. Where MOECTL_ALL_LAYERS is allowed, arrays hold the layers one
 * after another, in the order of moectl_layers().
 *
 * Structs start with `size`, which the caller sets to the sizeof of the struct. Members that come in later versions are
 * taken as zero from callers that do not know them. Zero always means: not given.
 *
 * What the words mean: docs/concepts.md. What each call does: moectl/controller.h, the same in C++. */
#ifndef MOECTL_H
#define MOECTL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moectl_controller moectl_controller;

enum moectl_code {
  MOECTL_OK = 0,
  MOECTL_INVALID = 1,   /* An argument that cannot be: an unknown layer, sizes that do not fit together. */
  MOECTL_CONFIG = 2,    /* A config that cannot be used: "file:line:column: key: value: constraint". */
  MOECTL_STATE = 3,     /* A saved state that cannot be loaded. */
  MOECTL_REDUCTION = 4, /* A reduction failed, or ranks disagree. The step may be tried again. */
  MOECTL_FAILED = 5     /* All else, as memory that ran out. */
};

#define MOECTL_ALL_LAYERS (-1)

/* "0.1.0". */
const char* moectl_version(void);
/* What the last failed call of this thread says; "" if none failed. Calls that succeed, and what their callbacks say,
 * leave it as it is. Valid until the next call that fails in this thread. */
const char* moectl_error(void);
/* For callbacks: what went wrong, before returning other than 0. It becomes part of the message. */
void moectl_set_error(const char* message);
/* Frees what a call returned as char**. NULL is allowed. Any thread. */
void moectl_free_text(char* text);

/* ---- Making a controller ---- */

/* From a config in YAML or JSON, which is YAML. `name` stands for the file in messages; NULL = "config". Sets *made,
 * which is the caller's, to be given to moectl_free(). */
int moectl_new(const char* config, const char* name, moectl_controller** made);
int moectl_new_from_file(const char* path, moectl_controller** made);
/* NULL is allowed. No call may be running on the controller. */
void moectl_free(moectl_controller* c);

/* ---- What it was made for: may run at any time ---- */

/* The number of layers and, if `ids` is not NULL, their ids [size]. */
int moectl_layers(const moectl_controller* c, int* ids, size_t size, size_t* layers);
/* Experts and choices a token of one layer. */
int moectl_shape(const moectl_controller* c, int layer, size_t* experts, size_t* top_k);
/* The whole config as JSON, every default filled in. *text is the caller's. */
int moectl_config(const moectl_controller* c, char** text);

/* ---- Recording: any number of times a step, from any threads ---- */

/* One micro-batch of one layer's routing. Only `tokens` and one of `experts` and `experts32` are required. */
typedef struct moectl_batch {
  size_t size;                 /* sizeof(moectl_batch) */
  size_t tokens;               /* T. */
  const int64_t* experts;      /* [T * top_k] row by row: each token's experts, before any capacity limit;
                                  -1 = a slot that is not routed. */
  const int32_t* experts32;    /* The same in 32 bits, instead. */
  const uint8_t* mask;         /* [T] zero = padding, not counted. NULL = all real. */
  int64_t sequence_length;     /* Tokens per sequence when the tokens are [B, S] row by row; 0 = not known. */
  const int64_t* sequence_ids; /* [T] non-decreasing, instead of sequence_length. */
  const float* top_values;     /* [T * (top_k + 1)] the largest biased scores, in the order of experts. */
  const float* biased_scores;  /* [T * N] the scores that selection compared. Requires top_values. */
  const float* probabilities;  /* [T * N] router probabilities. */
  const int64_t* domain_ids;   /* [T] the domain of each token, from 0. */
  const int64_t* dropped;      /* Assignments dropped for lack of capacity; NULL = not reported. */
  const double* balance_loss;  /* Before its weight, 0 to 2^24; NULL or anything else = not reported. */
  const double* z_loss;        /* Likewise. */
} moectl_batch;

/* `micro_batch` from 0: a second record of the same (layer, micro_batch) before the next step is ignored, so that
 * activation recomputation does not count twice; -1 = every call counts. Malformed data (an expert that does not exist,
 * a NaN) is no error: the layer holds in this step, and a notice says why. */
int moectl_record(moectl_controller* c, int layer, const moectl_batch* batch, int64_t micro_batch);
/* Counts that were summed elsewhere: [N] of one layer, or of MOECTL_ALL_LAYERS; `size` is their number. `tokens`: of
 * the layer, or [layers]; NULL = as many as the counts need, the sum over top_k, rounded up. */
int moectl_record_counts(moectl_controller* c, int layer, const int64_t* counts, size_t size,
                         const int64_t* tokens);
/* A value that the host computes itself: "router_similarity", "router_condition", "expert_output_norm" or
 * "gradient_ratio"; also "balance_loss" and "z_loss". Metrics report the mean over calls. A negative value or NaN is left
 * out. */
int moectl_record_value(moectl_controller* c, int layer, const char* name, double value);
/* A few tokens of one layer, to see whether the router chooses by its bias: experts [tokens * top_k], biased scores
 * [tokens * N] and, if not NULL, the same before the bias was added. A wrong wiring is a notice. */
int moectl_check_choices(moectl_controller* c, int layer, size_t tokens, const int64_t* experts,
                         const float* biased_scores, const float* scores);
/* Adds a notice of the host's own to the next step's report. `kind` as in run logs: "wiring", "config", … `layer` -1: of no
 * single layer. */
int moectl_say(moectl_controller* c, const char* kind, int layer, const char* text);

/* ---- Deciding: once an optimizer step ---- */

typedef struct moectl_step_info {
  size_t size;                 /* sizeof(moectl_step_info) */
  const double* loss;          /* Mean training loss of the step, nats a token; NULL = not known. */
  const double* gradient_norm; /* Global gradient norm; NULL = not known. */
  int skipped;                 /* Not 0: the optimizer skipped the step. */
  const int64_t* next_mixture; /* [domains] tokens of each domain in the next batch; NULL = not known. */
} moectl_step_info;

/* Reduces, measures, decides and limits. `info` may be NULL. After MOECTL_REDUCTION nothing has changed. Not while
 * another thread records. */
int moectl_step(moectl_controller* c, const moectl_step_info* info);
/* Steps so far. */
int moectl_steps(const moectl_controller* c, int64_t* steps);

/* Figures of the last step, means over its layers; NaN = not known. */
typedef struct moectl_figures {
  size_t size; /* sizeof(moectl_figures) */
  int64_t step;
  int64_t tokens;       /* Of a layer. */
  double max_vio;       /* How far the most loaded expert is above its share. */
  double floor_max_vio; /* What perfectly balanced routing would still show. */
  double cv;
  double floor_cv;
  double drop_rate;
  double dead_experts; /* Sum over layers. */
  int64_t limit_hits;  /* Actuators whose proposal a limit changed. */
  int64_t notices;     /* Found in this step. */
} moectl_figures;

/* Fills the first figures->size bytes. */
int moectl_figures_of(const moectl_controller* c, moectl_figures* figures);
/* The last step's records as a JSON array, one object a layer, as in a run log (docs/formats.md); without `arrays`
 * without values for each expert. *text is the caller's. */
int moectl_report_json(const moectl_controller* c, int arrays, char** text);

/* ---- The values in force, which the router reads: may run beside recording ---- */

/* Selection biases [N] of one layer, or of MOECTL_ALL_LAYERS; `size` is their number. */
int moectl_biases(const moectl_controller* c, int layer, double* bias, size_t size);
/* The same to deploy or validate with: without what serves the next batch alone (feed-forward, a probe). */
int moectl_deployment_biases(const moectl_controller* c, int layer, double* bias, size_t size);
int moectl_aux_loss_weight(const moectl_controller* c, int layer, double* weight);
int moectl_temperature(const moectl_controller* c, int layer, double* temperature);

/* ---- Holding, ranks, logs ---- */

/* For a controller that is new in the middle of a training: `step` is the training's next one. Warm-ups, schedules, the
   timeline and the log go on from there. Before the first moectl_step, on every rank alike. */
int moectl_begin_at(moectl_controller* c, int64_t step);

/* `on` not 0: holds every actuator where it is, and keeps measuring. */
int moectl_hold(moectl_controller* c, int on);
/* `on` not 0: holds one layer's actuators. */
int moectl_freeze(moectl_controller* c, int layer, int on);
enum moectl_plan {
  MOECTL_FROZEN = 1,    /* By the config, its timeline or moectl_freeze. */
  MOECTL_DECIDED = 2,   /* A policy or the guard decides, be it applied or not. */
  MOECTL_EVER_MOVES = 4 /* Some step of the config may move them; moectl_freeze and moectl_hold aside. */
};
/* What the step that comes does with the biases of each layer, as the sum of its enum moectl_plan, in the order of
 * moectl_layers(). `size` is the number of layers. */
int moectl_plans(const moectl_controller* c, unsigned char* plans, size_t size);
/* `sum` adds values[size] in place over all ranks that share the layers, and returns 0, or another number if it cannot;
 * moectl_step() then returns MOECTL_REDUCTION. It is called in moectl_step(), in that thread. `user` is passed through
 * and must live until it is replaced or the controller is freed. NULL = this process is the only rank. */
int moectl_set_reduction(moectl_controller* c, int (*sum)(void* user, int64_t* values, size_t size),
                         void* user);
/* `log` receives whole lines of a run log (docs/formats.md): the header now, those of a step at the end of each
 * moectl_step() that `log.every` selects. It returns 0, or another number if it cannot; that is a notice. NULL = none. */
int moectl_set_log(moectl_controller* c, int (*log)(void* user, const char* text, size_t size), void* user);
/* The same into a file, gzip if its name ends in .gz. `append` not 0: a resumed run continues its log. Replaces
 * moectl_set_log(). A file that cannot be written is reported on standard error and never stops training. */
int moectl_log_to_file(moectl_controller* c, const char* path, int append);

/* ---- Values from elsewhere: a checkpoint of another trainer, an older run ---- */

/* Puts biases [N] of one layer, or of MOECTL_ALL_LAYERS, in force at once; the policy goes on from there. On every rank
 * alike, between two steps. MOECTL_INVALID if one lies outside the limits; layers before it are then adopted. */
int moectl_adopt(moectl_controller* c, int layer, const double* bias, size_t size);
int moectl_adopt_aux_loss_weight(moectl_controller* c, int layer, double weight);
int moectl_adopt_temperature(moectl_controller* c, int layer, double temperature);

/* ---- State: everything that the next step depends on, to the bit ---- */

enum moectl_keep {
  MOECTL_EVERYTHING = 0, /* The state must be of the same config. */
  MOECTL_WHAT_FITS = 1   /* Of another config: values in force in any case, memories where they fit. */
};

/* *state is the caller's: *size bytes, to be given to moectl_free_text(). */
int moectl_save(const moectl_controller* c, char** state, size_t* size);
/* `kept`, unless NULL, receives what became of each part, as a JSON array of {"layer", "key", "fate", "why"}, where fate
 * is "kept", "adapted" or "dropped". *kept is the caller's. */
int moectl_load(moectl_controller* c, const char* state, size_t size, int keep, char** kept);
/* The same of one layer, to be loaded under the same id, also into a controller of other layers: another split of the
 * model over pipelines. All layers of a checkpoint must be of one step. */
int moectl_save_layer(const moectl_controller* c, int layer, char** state, size_t* size);
int moectl_load_layer(moectl_controller* c, int layer, const char* state, size_t size, int keep, char** kept);

#ifdef __cplusplus
}
#endif

#endif
