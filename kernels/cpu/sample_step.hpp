// What a step makes of its logits: samples and logprobs, one job each, shared among threads by job.
#pragma once

#include "sampling.hpp"
#include "share.hpp"

LLMC_BEGIN

// A sample (`known` < 0), or the logprob of a token that is known. Callers pass arrays of it: every field takes
// eight bytes but the four floats of `row`.
struct SampleJob {
  SampleRow row;
  int64_t logits_row, known;
  int64_t wants_logprob, num_top;
  // Results. `finite` is 0 where the row has NaN or +inf, or masks leave no token.
  int64_t finite, token, rank, num_found;
  double logprob;
  int32_t* top;          // [num_top]
  double* top_logprobs;  // [num_top]
};

LLMC_INLINE bool ids_within(const int64_t* ids, int64_t count, int64_t vocab) {
  if (count < 0 || (count > 0 && !ids)) return false;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab) return false;
  return true;
}

// Whether a job stays within `rows` rows of logits, the vocabulary, and its own arrays.
LLMC_INLINE bool job_fits(const SampleJob& job, int64_t rows, int64_t vocab) {
  const SampleRow& row = job.row;
  const bool reads_tokens = row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
  if (job.logits_row < 0 || job.logits_row >= rows || job.known >= vocab) return false;
  if (job.num_top < 0 || job.num_top > vocab || (job.num_top > 0 && (!job.top || !job.top_logprobs))) return false;
  if (job.known >= 0) return true;
  if (row.num_prompt_tokens < 0 || row.num_prompt_tokens > row.num_tokens || row.top_k < 0) return false;
  if (!(row.temperature >= 0.0f) || !(row.temperature <= kLargest)) return false;
  if (!(row.top_p > 0.0) || !(row.min_p <= 1.0) || row.num_tokens > UINT32_MAX) return false;
  if (reads_tokens && !ids_within(row.tokens, row.num_tokens, vocab)) return false;
  if (row.num_biases > 0 && !row.biases) return false;
  return ids_within(row.banned, row.num_banned, vocab) && ids_within(row.bias_ids, row.num_biases, vocab);
}

LLMC_INLINE void run_job(SampleJob* job, const float* logits, int64_t vocab, const SampleScratch& scratch) {
  if (job->known < 0) job->token = sample_token(logits, vocab, job->row, scratch);
  else job->token = best_of(logits, 0, vocab).finite ? job->known : -1;
  job->finite = job->token >= 0;
  job->num_found = 0;
  if (!job->finite || !job->wants_logprob) return;
  token_logprob(logits, vocab, job->token, job->num_top, &job->logprob, &job->rank, job->top, job->top_logprobs);
  job->num_found = std::min(job->num_top, vocab);
}

// Runs jobs over logits[.., vocab]. `scratch`: `sample_scratch_bytes(vocab)` for each of nt threads, zeroed once.
LLMC_KERNEL inline void run_jobs(int tid, int nt, SampleJob* jobs, int64_t count, const float* logits, int64_t vocab,
                                 char* scratch) {
  const Range mine = share(tid, nt, count);
  const SampleScratch own = sample_scratch(scratch + tid * sample_scratch_bytes(vocab), vocab);
  for (int64_t i = mine.begin; i < mine.end; ++i) run_job(jobs + i, logits + jobs[i].logits_row * vocab, vocab, own);
}

LLMC_END
