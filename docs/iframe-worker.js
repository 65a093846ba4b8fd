// A browser starts no worker from a file, so the search of a copy of this site on disk would find
// nothing. There, the worker's script runs in a frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.inside = new Promise((resolve) => {
        const frame = document.createElement("iframe");
        frame.hidden = true;
        frame.srcdoc = "<!doctype html>";
        frame.addEventListener("load", async () => {
          const inside = frame.contentWindow;
          const run = (source) =>
            new Promise((done, failed) => {
              const script = inside.document.createElement("script");
              script.addEventListener("load", done);
              script.addEventListener("error", failed);
              script.src = source;
              inside.document.head.append(script);
            });
          inside.importScripts = (...sources) =>
            sources.reduce((before, source) => before.then(() => run(source)), Promise.resolve());
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          await run(url);
          resolve(inside);
        });
        document.body.append(frame);
      });
    }

    postMessage(data) {
      this.inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
