import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.TreeMap;
import java.util.TreeSet;
import org.mlflow.api.proto.Service.*;
import org.mlflow.tracking.*;

/** MLflow's Java client against the server at args[0]; args[1] names the experiments. Exits 1 at the first surprise. */
public class MlflowJava {
  private static int checks = 0;

  public static void main(String[] args) throws Exception {
    MlflowClient client = new MlflowClient(args[0]);
    String name = args[1];
    String experiment = experiments(client, name);
    String run = runs(client, experiment);
    search(client, experiment, run);
    batch(client, experiment);
    fluent(client, name);
    if (args.length > 2) {
      artifacts(client, run, Path.of(args[2]));
    }
    client.close();
    System.out.println("checks " + checks);
    System.exit(0);
  }

  private static String experiments(MlflowClient client, String name) {
    String id = client.createExperiment(name);
    equal(client.getExperiment(id).getName(), name);
    equal(client.getExperimentByName(name).get().getExperimentId(), id);
    equal(client.getExperimentByName(name + " is not there").isPresent(), false);
    refused(() -> client.createExperiment(name));
    client.setExperimentTag(id, "team", "vision");
    equal(client.getExperiment(id).getTags(0).getValue(), "vision");
    client.deleteExperiment(id);
    equal(client.getExperiment(id).getLifecycleStage(), "deleted");
    client.restoreExperiment(id);
    equal(client.getExperiment(id).getLifecycleStage(), "active");
    client.renameExperiment(id, name + " renamed");
    equal(client.getExperiment(id).getName(), name + " renamed");
    String other = client.createExperiment(
        CreateExperiment.newBuilder().setName(name + " tagged").addTags(
            ExperimentTag.newBuilder().setKey("a").setValue("b")).build());
    ExperimentsPage page =
        client.searchExperiments("tags.a = 'b' AND name LIKE '" + name + "%'", ViewType.ALL, 10, List.of("name DESC"));
    equal(page.getItems().size(), 1);
    equal(page.getItems().get(0).getExperimentId(), other);
    ExperimentsPage first = client.searchExperiments("", ViewType.ACTIVE_ONLY, 1, List.of());
    equal(first.hasNextPage(), true);
    equal(((Page<Experiment>) first.getNextPage()).getItems().iterator().hasNext(), true);
    experimentPages(client, name);
    return id;
  }

  /** Three experiments of a tag, one of them deleted: filters, views, and pages of 1 and 2. */
  private static void experimentPages(MlflowClient client, String name) {
    List<String> made = new ArrayList<>();
    for (String letter : List.of("x", "y", "z")) {
      String id = client.createExperiment(name + " page " + letter);
      client.setExperimentTag(id, "pages", name);
      client.setExperimentTag(id, "lines", "one\ntwo");
      made.add(id);
    }
    client.deleteExperiment(made.get(1));
    String tagged = "tags.pages = '" + name + "'";
    equal(client.searchExperiments(tagged).getItems().size(), 2);
    equal(client.searchExperiments(tagged + " AND attribute.name = '" + name + " page x'").getItems().size(), 1);
    equal(experimentIds(client.searchExperiments(tagged, ViewType.DELETED_ONLY, 10, List.of())), made.subList(1, 2));
    ExperimentsPage one = client.searchExperiments(tagged, ViewType.ALL, 1, List.of("attribute.name"));
    equal(experimentIds(one), made.subList(0, 1));
    equal(one.getNextPageToken().isPresent(), true);
    ExperimentsPage rest = client.searchExperiments(
        tagged, ViewType.ALL, 2, List.of("attribute.name"), one.getNextPageToken().get());
    equal(experimentIds(rest), made.subList(1, 3));
    equal(rest.getNextPageToken().isPresent(), false);
    ExperimentsPage next = (ExperimentsPage) one.getNextPage();
    equal(experimentIds(next), made.subList(1, 2));
    equal(next.getNextPageToken().isPresent(), true);
    Experiment first = client.getExperiment(made.get(0));
    equal(first.getTagsList().stream().anyMatch(tag -> tag.getValue().equals("one\ntwo")), true);
    equal(first.getTagsCount(), 2);
  }

  private static List<String> experimentIds(ExperimentsPage page) {
    List<String> found = new ArrayList<>();
    page.getItems().forEach(experiment -> found.add(experiment.getExperimentId()));
    return found;
  }

  private static String runs(MlflowClient client, String experiment) {
    long before = System.currentTimeMillis();
    RunInfo made = client.createRun(experiment);
    String id = made.getRunId();
    equal(made.getRunUuid(), id);
    equal(made.getStatus(), RunStatus.RUNNING);
    equal(client.getRun(id).getInfo().getStartTime() >= before, true);
    client.logParam(id, "depth", "3");
    client.logParam(id, "depth", "3");
    refused(() -> client.logParam(id, "depth", "4"));
    client.logMetric(id, "accuracy", 0.9733333333333334D);
    client.logMetric(id, "loss", 123.456789123456789D, 2000, 1);
    client.logMetric(id, "loss", 2.0, 3000, -5);
    client.logMetric(id, "loss", -3.0, 3000, 4);
    client.logMetric(id, "loss", 4.0, 2999, 4);
    refused(() -> client.logMetric(id, "loss", 1.0, -1000, 1));
    client.logMetric(id, "nan", Double.NaN);
    client.logMetric(id, "up", Double.POSITIVE_INFINITY);
    client.logMetric(id, "down", Double.NEGATIVE_INFINITY);
    client.logMetric(id, "far", 1.0, 1, Long.MAX_VALUE);
    client.setTag(id, "email", "some@email.com");
    client.setTag(id, "gone", "x");
    client.deleteTag(id, "gone");
    refused(() -> client.deleteTag(id, "gone"), "No tag with name: gone in run with id " + id);
    refused(() -> client.deleteTag(id, "never"), "No tag with name: never in run with id " + id);
    refused(() -> client.deleteTag("fakeRunId", "never"), "Run with id=fakeRunId not found");
    equal(client.getRun(id).getData().getTagsList().stream().noneMatch(
        tag -> tag.getKey().equals("mlflow.parentRunId") || tag.getKey().equals("gone")), true);
    client.setTerminated(id, RunStatus.FINISHED, before + 5);
    Run run = client.getRun(id);
    equal(run.getInfo().getStatus(), RunStatus.FINISHED);
    equal(run.getInfo().getEndTime(), before + 5);
    equal(run.getInfo().getExperimentId(), experiment);
    Map<String, Double> metrics = new TreeMap<>();
    run.getData().getMetricsList().forEach(metric -> metrics.put(metric.getKey(), metric.getValue()));
    equal(metrics.keySet(), new TreeSet<>(List.of("accuracy", "down", "far", "loss", "nan", "up")));
    equal(metrics.get("accuracy"), 0.9733333333333334D);
    equal(metrics.get("loss"), -3.0);
    equal(metrics.get("nan"), Double.NaN);
    equal(metrics.get("up"), Double.MAX_VALUE);
    equal(metrics.get("down"), -Double.MAX_VALUE);
    equal(run.getData().getParams(0).getValue(), "3");
    List<Metric> history = client.getMetricHistory(id, "loss");
    List<Double> values = new ArrayList<>();
    List<Long> steps = new ArrayList<>();
    for (Metric metric : history) {
      values.add(metric.getValue());
      steps.add(metric.getStep());
    }
    equal(values, List.of(123.456789123456789D, 4.0, 2.0, -3.0));
    equal(steps, List.of(1L, 4L, -5L, 4L));
    equal(client.getMetricHistory(id, "far").get(0).getStep(), Long.MAX_VALUE);
    equal(client.getMetricHistory(id, "none").size(), 0);
    client.deleteRun(id);
    equal(client.getRun(id).getInfo().getLifecycleStage(), "deleted");
    refused(() -> client.logParam(id, "after", "1"));
    client.restoreRun(id);
    equal(client.getRun(id).getInfo().getLifecycleStage(), "active");
    refused(() -> client.getRun("0123456789abcdef0123456789abcdef"));
    return id;
  }

  private static void search(MlflowClient client, String experiment, String first) {
    RunInfo second = client.createRun(
        CreateRun.newBuilder().setExperimentId(experiment).setStartTime(1).setUserId("me").addTags(
            RunTag.newBuilder().setKey("mlflow.runName").setValue("second")).build());
    client.logMetric(second.getRunId(), "accuracy", 0.1);
    client.logParam(second.getRunId(), "depth", "15");
    List<String> where = List.of(experiment);
    equal(ids(client.searchRuns(where, "metrics.accuracy < 0.5")), List.of(second.getRunId()));
    equal(ids(client.searchRuns(where, "params.depth = '3' and tags.email LIKE '%email.com'")), List.of(first));
    equal(ids(client.searchRuns(where, "attributes.run_name = 'second'")), List.of(second.getRunId()));
    equal(ids(client.listRunInfos(experiment)).size(), 2);
    RunsPage page = client.searchRuns(where, "", ViewType.ACTIVE_ONLY, 1, List.of("metrics.accuracy ASC"));
    equal(page.getItems().get(0).getInfo().getRunId(), second.getRunId());
    equal(page.hasNextPage(), true);
    Page<Run> next = page.getNextPage();
    equal(next.getItems().iterator().next().getInfo().getRunId(), first);
    equal(next.hasNextPage(), false);
    equal(next.getNextPage().getPageSize(), 0);
    equal(client.searchRuns(where, "", ViewType.ACTIVE_ONLY, 1000).getNextPageToken().isPresent(), false);
    RunsPage ordered = client.searchRuns(
        where, "", ViewType.ACTIVE_ONLY, 1000, List.of("params.depth DESC", "metrics.accuracy"));
    equal(ordered.getItems().get(0).getInfo().getRunId(), first);
    refused(() -> client.searchRuns(where, "nonsense ="));
  }

  private static void batch(MlflowClient client, String experiment) {
    String id = client.createRun(experiment).getRunId();
    List<Metric> metrics = List.of(metric("a", 0.081D, 10, 0), metric("b", 1.0, 1000, 1), metric("b", 2.0, 2000, 3));
    client.logBatch(
        id, metrics, List.of(Param.newBuilder().setKey("p").setValue("a b").build()),
        List.of(RunTag.newBuilder().setKey("t").setValue("v").build()));
    client.logBatch(id, metrics, null, null);
    Run run = client.getRun(id);
    equal(run.getData().getMetricsCount(), 2);
    equal(run.getData().getParams(0).getValue(), "a b");
    equal(run.getData().getTagsList().stream().anyMatch(tag -> tag.getKey().equals("t")), true);
    equal(client.getMetricHistory(id, "b").size(), 2);
    client.logBatch(id, null, null, List.of(RunTag.newBuilder().setKey("mlflow.runName").setValue("my run").build()));
    equal(client.getRun(id).getInfo().getRunName(), "my run");
    equal(client.getRun(id).getData().getTagsCount(), 2);
    List<Long> expected = new ArrayList<>();
    for (long from = 0; from < 26_000; from += 1_000) {
      List<Metric> part = new ArrayList<>();
      for (long step = from; step < from + 1_000; step++) {
        part.add(metric("long", step, step, step));
        expected.add(step);
      }
      client.logBatch(id, part, null, null);
    }
    List<Long> steps = new ArrayList<>();
    client.getMetricHistory(id, "long").forEach(metric -> steps.add(metric.getStep()));
    equal(steps, expected);
  }

  private static void fluent(MlflowClient client, String name) {
    MlflowContext context = new MlflowContext(client).setExperimentName(name + " tagged");
    ActiveRun parent = context.startRun("parent");
    parent.logParams(Map.of("x", "1", "y", "2"));
    parent.logMetrics(Map.of("m", 1.5, "n", 2.5), 7);
    parent.setTags(Map.of("k", "v"));
    ActiveRun child = context.startRun("child", parent.getId());
    child.endRun(RunStatus.FAILED);
    context.withActiveRun("inside", active -> active.logMetric("q", 3.0));
    parent.endRun();
    Run run = client.getRun(parent.getId());
    equal(run.getInfo().getStatus(), RunStatus.FINISHED);
    equal(run.getInfo().getRunName(), "parent");
    equal(run.getData().getParamsCount(), 2);
    equal(run.getData().getMetrics(0).getStep(), 7L);
    equal(parent.getArtifactUri().isEmpty(), false);
    Run below = client.getRun(child.getId());
    equal(below.getInfo().getStatus(), RunStatus.FAILED);
    equal(below.getData().getTagsList().stream().anyMatch(
        tag -> tag.getKey().equals("mlflow.parentRunId") && tag.getValue().equals(parent.getId())), true);
    equal(client.searchRuns(List.of(context.getExperimentId()), "metrics.q = 3").size(), 1);
  }

  /** The Java client has no artifact code of its own: it calls the `mlflow` command. */
  private static void artifacts(MlflowClient client, String run, Path folder) throws Exception {
    Path file = folder.resolve("note.txt");
    Files.writeString(file, "hello from Java");
    client.logArtifact(run, file.toFile());
    client.logArtifact(run, file.toFile(), "sub");
    TreeSet<String> found = new TreeSet<>();
    client.listArtifacts(run).forEach(info -> found.add(info.getPath() + (info.getIsDir() ? "/" : "")));
    equal(found, new TreeSet<>(List.of("note.txt", "sub/")));
    File back = client.downloadArtifacts(run, "note.txt");
    equal(Files.readString(back.toPath()), "hello from Java");
  }

  private static Metric metric(String key, double value, long timestamp, long step) {
    return Metric.newBuilder().setKey(key).setValue(value).setTimestamp(timestamp).setStep(step).build();
  }

  private static List<String> ids(List<RunInfo> infos) {
    List<String> found = new ArrayList<>();
    infos.forEach(info -> found.add(info.getRunId()));
    return found;
  }

  private static void equal(Object found, Object expected) {
    checks++;
    if (!Objects.equals(found, expected)) {
      throw new AssertionError("check " + checks + ": expected " + expected + ", found " + found);
    }
  }

  private static void refused(Runnable call) {
    refused(call, "");
  }

  private static void refused(Runnable call, String words) {
    checks++;
    try {
      call.run();
    } catch (MlflowClientException expected) {
      if (expected.getMessage().contains(words)) {
        return;
      }
      throw new AssertionError("check " + checks + ": expected '" + words + "' in " + expected.getMessage());
    }
    throw new AssertionError("check " + checks + ": the server should have refused this");
  }
}
