// The bridge from Kotlin to the C API; texts cross it as UTF-8 bytes, since JNI's own strings are not.
#include <jni.h>

#include <string>
#include <vector>

#include "pocketvlm.h"

namespace {

std::string text_of(JNIEnv* env, jbyteArray bytes) {
  if (bytes == nullptr) return "";
  std::string text(static_cast<size_t>(env->GetArrayLength(bytes)), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()),
                          reinterpret_cast<jbyte*>(text.data()));
  return text;
}

// Raises IllegalStateException with the reason, and frees it.
void raise(JNIEnv* env, char* reason) {
  const jclass kind = env->FindClass("java/lang/IllegalStateException");
  if (kind != nullptr) env->ThrowNew(kind, reason == nullptr ? "memory ran out" : reason);
  pocketvlm_free(reason);
}

pocketvlm_conversation* conversation_of(jlong handle) {
  return reinterpret_cast<pocketvlm_conversation*>(handle);
}

// The view is good for as long as the content.
pocketvlm_picture picture_of(const std::string& content) {
  return {reinterpret_cast<const uint8_t*>(content.data()), content.size()};
}

struct Listener {
  JNIEnv* env;
  jobject listener;
  jmethodID on_piece;
};

void pass_on(const char* piece, void* context) {
  const auto* to = static_cast<Listener*>(context);
  if (to->env->ExceptionCheck() == JNI_TRUE) return;
  const std::string text = piece;
  const jbyteArray bytes = to->env->NewByteArray(static_cast<jsize>(text.size()));
  if (bytes == nullptr) return;
  to->env->SetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()),
                              reinterpret_cast<const jbyte*>(text.data()));
  to->env->CallVoidMethod(to->listener, to->on_piece, bytes);
  to->env->DeleteLocalRef(bytes);
}

}  // namespace

extern "C" {

JNIEXPORT jlong JNICALL Java_dev_pocketvlm_Native_open(JNIEnv* env, jclass, jbyteArray bundle,
                                                       jbyteArray library, jint threads) {
  char* reason = nullptr;
  auto* opened = pocketvlm_open(text_of(env, bundle).c_str(), text_of(env, library).c_str(),
                                threads, &reason);
  if (opened == nullptr) raise(env, reason);
  return reinterpret_cast<jlong>(opened);
}

JNIEXPORT void JNICALL Java_dev_pocketvlm_Native_chooseVision(JNIEnv* env, jclass, jlong handle,
                                                              jint visual_tokens, jint width,
                                                              jint height) {
  char* reason = nullptr;
  if (pocketvlm_choose_vision(conversation_of(handle), visual_tokens, width, height, &reason) != 0) {
    raise(env, reason);
  }
}

JNIEXPORT void JNICALL Java_dev_pocketvlm_Native_encodeAhead(JNIEnv* env, jclass, jlong handle,
                                                             jbyteArray picture) {
  const std::string content = text_of(env, picture);
  const pocketvlm_picture shown = picture_of(content);
  char* reason = nullptr;
  if (pocketvlm_encode_ahead(conversation_of(handle), &shown, &reason) != 0) raise(env, reason);
}

JNIEXPORT void JNICALL Java_dev_pocketvlm_Native_ask(JNIEnv* env, jclass, jlong handle,
                                                     jbyteArray rendered, jobjectArray pictures,
                                                     jint max_new_tokens, jobject listener) {
  std::vector<std::string> contents;
  for (jsize i = 0; i < env->GetArrayLength(pictures); ++i) {
    const auto bytes = static_cast<jbyteArray>(env->GetObjectArrayElement(pictures, i));
    contents.push_back(text_of(env, bytes));
    env->DeleteLocalRef(bytes);
  }
  std::vector<pocketvlm_picture> shown;
  for (const std::string& content : contents) shown.push_back(picture_of(content));
  const jclass kind = env->GetObjectClass(listener);
  Listener to{env, listener, env->GetMethodID(kind, "onPiece", "([B)V")};
  if (to.on_piece == nullptr) return;
  char* reason = nullptr;
  const int status =
      pocketvlm_ask(conversation_of(handle), text_of(env, rendered).c_str(), shown.data(),
                    shown.size(), max_new_tokens, pass_on, &to, &reason);
  if (status != 0 && env->ExceptionCheck() == JNI_FALSE) raise(env, reason);
}

JNIEXPORT void JNICALL Java_dev_pocketvlm_Native_reset(JNIEnv*, jclass, jlong handle) {
  pocketvlm_reset(conversation_of(handle));
}

JNIEXPORT void JNICALL Java_dev_pocketvlm_Native_close(JNIEnv*, jclass, jlong handle) {
  pocketvlm_close(conversation_of(handle));
}

JNIEXPORT jint JNICALL Java_dev_pocketvlm_Native_runJob(JNIEnv* env, jclass, jbyteArray job,
                                                        jbyteArray library, jint descriptor) {
  return pocketvlm_run_job(text_of(env, job).c_str(), text_of(env, library).c_str(), descriptor);
}

}
