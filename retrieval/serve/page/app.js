// The page works without this file; with it, searches replace the results in place and pictures can be pasted.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("search"), look = $("look"), toast = $("toast"), drop = $("drop");
let running = null, typing = 0, current = null, toasting = 0;

function say(text) {
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => { toast.hidden = true; }, 6000);
}

// ---- searching ----

function addressOf(data) {
  const pairs = [...data].filter(([name, value]) => value !== "" && typeof value === "string");
  const query = new URLSearchParams(pairs).toString();
  return query ? "/?" + query : "/";
}

// Fetch the page at an address and show its results. how: "push" or "replace" the entry of the history, or "none".
async function go(address, how) {
  running?.abort();
  const mine = running = new AbortController();
  $("results").classList.add("busy");
  try {
    const answer = await fetch(address, { signal: mine.signal, headers: { Accept: "text/html" } });
    if (!(answer.headers.get("content-type") || "").startsWith("text/html")) throw new Error((await answer.json()).detail);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (mine.signal.aborted) return;
    if (look.open) look.close();
    for (const part of ["results", "terms"]) $(part).replaceWith(document.adoptNode(page.getElementById(part)));
    const field = page.getElementById("q");
    if (document.activeElement !== $("q") || how !== "replace") $("q").value = field.value;
    for (const name of ["split", "rerank"]) {
      const from = page.querySelector(`[name=${name}]`), to = form.elements[name];
      if (from && to) { to.value = from.value; to.checked = from.checked; }
    }
    document.title = page.title;
    if (how === "push" && address !== location.pathname + location.search) history.pushState(null, "", address);
    if (how === "replace") history.replaceState(null, "", address);
    if (how === "push") scrollTo(0, 0);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message || "The server does not answer.");
  } finally {
    if (running === mine) { running = null; $("results").classList.remove("busy"); }
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  go(addressOf(new FormData(form)), "push");
});
form.addEventListener("change", (event) => { if (event.target.id !== "q" && event.target.id !== "file") form.requestSubmit(); });
$("q").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => go(addressOf(new FormData(form)), "replace"), 300);
});
addEventListener("popstate", () => go(location.pathname + location.search, "none"));

document.addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  const link = event.target.closest("a");
  if (!link) return;
  if (link.classList.contains("open")) { event.preventDefault(); show(link); return; }
  if (link.matches(".more, .less, .remove, .further a, #look-more, #look-less, .brand")) {
    event.preventDefault();
    go(link.getAttribute("href"), "push");
  }
});

// ---- pictures of one's own ----

async function searchWith(file) {
  if (!file) return;
  $("results").classList.add("busy");
  try {
    const answer = await fetch("/api/pictures", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.detail);
    const data = new FormData(form);
    data.append("plus", told.name);
    await go(addressOf(data), "push");
  } catch (error) {
    say(error.message || "The picture cannot be uploaded.");
  } finally {
    $("results").classList.remove("busy");
    $("file").value = "";
  }
}

const pictureIn = (transfer) => [...(transfer?.files || [])].find((file) => file.type.startsWith("image/"));
document.querySelector(".upload").hidden = false;
$("file").addEventListener("change", () => searchWith($("file").files[0]));
addEventListener("paste", (event) => {
  const file = pictureIn(event.clipboardData);
  if (file) { event.preventDefault(); searchWith(file); }
});
addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) { event.preventDefault(); drop.hidden = false; }
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.hidden = true; });
addEventListener("drop", (event) => {
  drop.hidden = true;
  const file = pictureIn(event.dataTransfer);
  if (file) { event.preventDefault(); searchWith(file); }
});

// ---- one picture ----

function show(link) {
  current = link;
  const card = link.closest(".hit");
  $("large").classList.remove("heat");
  $("large").src = link.href;
  $("large").alt = link.title;
  $("score").textContent = link.dataset.score.includes("match") ? link.dataset.score : link.dataset.score && `score ${link.dataset.score}`;
  $("captions").replaceChildren(...JSON.parse(link.dataset.captions).slice(0, 5).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  $("look-more").href = card.querySelector(".more").getAttribute("href");
  const less = card.querySelector(".less");
  $("look-less").hidden = !less;
  if (less) $("look-less").href = less.getAttribute("href");
  $("heat").hidden = !link.dataset.heat;
  $("heat").textContent = "Heat map";
  $("captions").hidden = false;
  if (!look.open) look.showModal();
}

$("heat").addEventListener("click", () => {
  const heated = $("large").classList.toggle("heat");
  $("heat").textContent = heated ? "Picture" : "Heat map";
  $("captions").hidden = heated;
  $("large").src = heated ? current.dataset.heat : current.href;
});
$("large").addEventListener("error", () => say($("large").classList.contains("heat") ? "There is no heat map of it." : "The picture is not there any more."));
$("close").addEventListener("click", () => look.close());
look.addEventListener("click", (event) => { if (event.target === look) look.close(); });
look.addEventListener("close", () => {  // it comes after a key that followed, such as /
  if (current?.isConnected && document.activeElement !== $("q")) current.focus();
});

// ---- keyboard ----

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  if (event.key === "/") { event.preventDefault(); if (look.open) look.close(); $("q").focus(); $("q").select(); return; }
  const links = [...document.querySelectorAll(".open")].filter((link) => link.offsetParent);
  const at = links.indexOf(look.open ? current : document.activeElement.closest(".hit")?.querySelector(".open"));
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && links.length) {
    event.preventDefault();
    const next = links[at < 0 ? 0 : Math.min(Math.max(at + step, 0), links.length - 1)];
    if (look.open) show(next); else next.focus();
  }
  const way = { m: ".more", l: ".less" }[event.key];
  if (way && at >= 0) links[at].closest(".hit").querySelector(way)?.click();
});
