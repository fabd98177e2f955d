import com.clickhouse.client.api.ServerException;
import java.sql.Connection;
import java.sql.DatabaseMetaData;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.ResultSetMetaData;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Properties;

/**
 * Asks a runstream server through ClickHouse's JDBC driver and prints what it finds, one `name: value` a line.
 *
 * Arguments: the JDBC URL, user, password.
 */
public final class SqlClient {
    private SqlClient() {}

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.setProperty("user", arguments[1]);
        properties.setProperty("password", arguments[2]);
        try (Connection connection = DriverManager.getConnection(arguments[0], properties)) {
            metadata(connection.getMetaData());
            types(connection);
            prepared(connection);
            errors(connection);
            streams(connection);
        }
        try {
            properties.setProperty("password", "wrong-password");
            try (Connection connection = DriverManager.getConnection(arguments[0], properties);
                    Statement statement = connection.createStatement();
                    ResultSet result = statement.executeQuery("SELECT 1")) {
                say("wrong password", "accepted " + result.next());
            }
        } catch (SQLException failure) {
            say("wrong password", brief(failure));
        }
    }

    private static void metadata(DatabaseMetaData found) throws SQLException {
        say("product", found.getDatabaseProductName() + " " + found.getDatabaseMajorVersion());
        say("schemas", column(found.getSchemas(), "TABLE_SCHEM"));
        say("tables", column(found.getTables(null, "runstream", "%", null), "TABLE_NAME"));
        say("views", column(found.getTables(null, "runstream", "%", new String[] {"VIEW"}), "TABLE_NAME"));
        say("columns", column(found.getColumns(null, "runstream", "runs", "%"), "COLUMN_NAME"));
        say("column types", column(found.getColumns(null, "runstream", "experiments", "%"), "TYPE_NAME"));
        say("types", String.valueOf(column(found.getTypeInfo(), "TYPE_NAME").split(" ").length > 20));
        say("primary keys", column(found.getPrimaryKeys(null, "runstream", "points"), "COLUMN_NAME"));
    }

    private static void types(Connection connection) throws SQLException {
        String sql = "SELECT toInt8(-1) AS i8, toUInt64(18446744073709551615) AS u64, bitShiftLeft(toUInt128(1), 100) AS u128,"
            + " 1.5 AS f, nan AS n, 'ä\\n' AS s, CAST('x' AS LowCardinality(String)) AS lc,"
            + " CAST(NULL AS Nullable(Float64)) AS nothing, [1, 2] AS a, map('k', 'v') AS m,"
            + " toDateTime64('2024-01-02 03:04:05.678', 3, 'UTC') AS d, true AS b, toDecimal64(1.25, 2) AS dec";
        try (Statement statement = connection.createStatement(); ResultSet result = statement.executeQuery(sql)) {
            ResultSetMetaData columns = result.getMetaData();
            StringBuilder names = new StringBuilder();
            for (int n = 1; n <= columns.getColumnCount(); n++) {
                names.append(columns.getColumnTypeName(n)).append(' ');
            }
            say("type names", names.toString().trim());
            result.next();
            say("i8", result.getInt("i8"));
            say("u64", result.getObject("u64"));
            say("u128", result.getObject("u128"));
            say("f", result.getDouble("f"));
            say("n", result.getDouble("n"));
            say("s", result.getString("s").replace("\n", "<newline>"));
            say("lc", result.getString("lc"));
            result.getDouble("nothing");
            say("nothing", result.wasNull());
            Object[] array = (Object[]) result.getArray("a").getArray();
            say("a", array.length + " " + array[1]);
            say("m", result.getObject("m"));
            say("d", result.getTimestamp("d").toInstant());
            say("b", result.getBoolean("b"));
            say("dec", result.getBigDecimal("dec"));
            say("end", result.next());
        }
    }

    private static void prepared(Connection connection) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("SELECT ? AS a, ? + 1 AS b, length(?) AS c")) {
            statement.setString(1, "it's; DROP TABLE points --");
            statement.setLong(2, 41);
            statement.setString(3, "\\'\n");
            try (ResultSet result = statement.executeQuery()) {
                result.next();
                say("prepared", result.getString(1) + " | " + result.getLong(2) + " | " + result.getLong(3));
            }
        }
        try (PreparedStatement statement = connection.prepareStatement("SELECT run_id FROM runs WHERE run_id = ?")) {
            statement.setString(1, "none");
            try (ResultSet result = statement.executeQuery()) {
                say("empty", result.next() + " " + result.getMetaData().getColumnName(1));
            }
        }
    }

    private static void errors(Connection connection) throws SQLException {
        String[] statements = {
            "SELECT nope", "SELECT * FROM nope", "SELEKT 1", "SELECT throwIf(1, 'at once')", "DROP TABLE points",
            "INSERT INTO points SELECT * FROM points", "SELECT file('/etc/passwd')", "SELECT data_paths FROM system.tables",
        };
        for (String sql : statements) {
            try (Statement statement = connection.createStatement()) {
                statement.execute(sql);
                say("error " + sql, "none");
            } catch (SQLException failure) {
                say("error " + sql, code(failure));
            }
        }
        try (Statement statement = connection.createStatement(); ResultSet result = statement.executeQuery("SELECT 1")) {
            say("after errors", result.next() && result.getInt(1) == 1);
        }
    }

    private static void streams(Connection connection) throws SQLException {
        for (long bad : new long[] {-1, 0, 100_000, 900_000}) {
            String sql = "SELECT number, throwIf(number = " + bad + ", 'in the middle') FROM numbers(1000000)";
            long rows = 0;
            long sum = 0;
            String end = "whole";
            try (Statement statement = connection.createStatement(); ResultSet result = statement.executeQuery(sql)) {
                while (result.next()) {
                    rows++;
                    sum += result.getLong(1);
                }
            } catch (SQLException failure) {
                end = brief(failure);
            }
            say("stream " + bad, rows + " " + sum + " " + end);
        }
    }

    private static String brief(SQLException failure) {
        return code(failure) + " " + String.valueOf(failure.getMessage()).replace('\n', ' ');
    }

    /** The store's code: the driver keeps it in the cause. */
    private static int code(SQLException failure) {
        for (Throwable cause = failure; cause != null; cause = cause.getCause()) {
            if (cause instanceof ServerException) {
                return ((ServerException) cause).getCode();
            }
        }
        return -1;
    }

    private static String column(ResultSet result, String name) throws SQLException {
        StringBuilder found = new StringBuilder();
        try (result) {
            while (result.next()) {
                found.append(result.getString(name)).append(' ');
            }
        }
        return found.toString().trim();
    }

    private static void say(String name, Object value) {
        System.out.println(name + ": " + value);
    }
}
