/* The C++ runner as a library, for apps in any language: a conversation about pictures, and the jobs
 * of the line protocol. Texts are UTF-8. What goes wrong is a line in `*reason`, which the caller
 * frees by pocketvlm_free; `reason` may be NULL. One conversation is used by one thread at a time. */
#ifndef POCKETVLM_H
#define POCKETVLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pocketvlm_conversation pocketvlm_conversation;

/* An encoded picture, JPEG or PNG. */
typedef struct pocketvlm_picture {
  const uint8_t* bytes;
  size_t size;
} pocketvlm_picture;

/* Called with each piece of an answer as soon as it is certain. */
typedef void (*pocketvlm_piece)(const char* text, void* context);

/* Loads the ONNX graphs of a bundle's folder. `onnxruntime` is ONNX Runtime's library, or NULL for
 * the one that is found; `threads` is 0 for one per physical core. NULL if it cannot be opened. */
pocketvlm_conversation* pocketvlm_open(const char* bundle, const char* onnxruntime, int threads,
                                       char** reason);

/* Which vision graph sees the pictures of later questions, where a bundle has several: the one with
 * this many visual tokens per tile and for pictures of this size; 0 for any, which is the first
 * number of tokens and the size closest to a picture's ratio of sides. 0, or -1 with a reason where
 * there is no such graph, which leaves the choice as it was. */
int pocketvlm_choose_vision(pocketvlm_conversation* conversation, int visual_tokens, int width,
                            int height, char** reason);

/* Encodes a picture of the next question before it is asked, as while a user types. The question's
 * text has its marker, before those of the pictures that come with pocketvlm_ask. 0, or -1 with a
 * reason; a picture that cannot be read changes nothing. */
int pocketvlm_encode_ahead(pocketvlm_conversation* conversation, const pocketvlm_picture* picture,
                           char** reason);

/* Asks. `rendered` is the chat template's text of this turn and all before it, with a marker per
 * picture and U+F0002 for every earlier answer. 0, or -1 with a reason; after a failure the
 * conversation starts over. */
int pocketvlm_ask(pocketvlm_conversation* conversation, const char* rendered,
                  const pocketvlm_picture* pictures, size_t count, int max_new_tokens,
                  pocketvlm_piece on_piece, void* context, char** reason);

/* Forgets every turn; the graphs stay loaded. */
void pocketvlm_reset(pocketvlm_conversation* conversation);

void pocketvlm_close(pocketvlm_conversation* conversation);

/* Does one job of the line protocol and writes its lines to a file descriptor, which stays open.
 * The exit status of a runner: 0 with a result, 2 with a reason. */
int pocketvlm_run_job(const char* job, const char* onnxruntime, int descriptor);

void pocketvlm_free(char* reason);

#ifdef __cplusplus
}
#endif

#endif
